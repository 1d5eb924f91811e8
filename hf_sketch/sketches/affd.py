"""AFFD: signs, Hadamard, Gaussian, Hadamard, restrict."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from hf_sketch.sketches.blocked import MixedSketch
from hf_sketch.sketches.transforms.magnitudes import weigh_
from hf_sketch.sketches.transforms.mixing import Mixing, mix_adjoint, mix_rows, mixing
from hf_sketch.sketches.variances.moments import collisions


@dataclass(frozen=True)
class AFFD(MixedSketch):
    """Signs, Hadamard, Gaussian diagonal, Hadamard; keep the first coordinates.

    On one block of n elements this is sqrt(n / out_size) R H2 G H1 B: B random signs,
    G a Gaussian diagonal, H1 and H2 Kronecker products of small Hadamard matrices with
    permuted rows (H1) and permuted columns (H2), each scaled to be orthogonal, R the
    first `out_size` coordinates. There are no gathers. E|S x|^2 = |x|^2.

    With `block_size`, x is cut into blocks (the last one padded with zeros) whose
    sketches are summed. Blocks share H1, H2 and the magnitudes in G; the signs in B and
    in G are fresh for every block and `stream`. The first two moments of an inner
    product are those of independent blocks, and H2 is applied once to the sum, so that
    each block costs one transform.

    Growing `out_size` keeps what was there: at equal block sizes the first D
    coordinates of AFFD(2D) are those of AFFD(D), divided by sqrt(2).

    Args:
        in_size: number of parameters sketched.
        out_size: length of the sketch, in [1, block size].
        seed: the only source of randomness; equal arguments, equal matrix.
        block_size: a power of two; by default in_size rounded up to one.
        stream: a name that gives independent signs under the same seed.
        mix: "hadamard"; "fft" (H1 and H2 become discrete Hartley transforms); or
            "kronecker" (random rotations, and no B).

    Raises:
        ValueError: a size is out of range, `block_size` is not a power of two, or `mix`
            is unknown.

    Reference:
        Schioppa 2024, arXiv:2402.03994, eq. (6), section 3 and B.4; H1 and H2 stand
        where eq. (6) has them (Listing 4 applies their transposes); zero padding and
        the real form of the FFT are ours.
    """

    def finish(self, mixed: Tensor) -> Tensor:
        """R H2 |G| and the whole scale; |G|'s signs are those after H1."""
        weighted = weigh_(mixed, self.seed, self.scale)
        return mix_rows(weighted, self.second, self.out_size)

    def finish_adjoint(self, rows: Tensor) -> Tensor:
        mixed = mix_adjoint(rows, self.second, self.block)
        return weigh_(mixed.contiguous(), self.seed, self.scale)

    @property
    def spread_variance(self) -> float:
        """Variance of a Gaussian matrix, plus 6 / n for the magnitudes in G."""
        return 2 / self.out_size + 6 / self.block

    @property
    def cross_variance(self) -> float:
        """Variance of a Gaussian matrix, plus G's share, common to all blocks."""
        own = 1 if self.in_size <= self.block else 2
        return 1 / self.out_size + own / self.block

    def square_variance(self, rows: Tensor) -> Tensor:
        x = self.moments(rows)
        repeated = collisions(self.block, self.out_size).to(x.transformed)
        once = 2 * x.between + 6 * x.whole - 4 * x.fourth
        each = 2 * x.whole - 4 * x.fourth
        twice = each * repeated.sum() + 4 * x.transformed @ repeated
        return (once + twice) / self.block

    @property
    def scale(self) -> float:
        """The restriction's sqrt(n / D), and 1 / sqrt(n) of each transform."""
        return (self.block * self.out_size) ** -0.5

    @cached_property
    def second(self) -> Mixing:
        """The factors of H2, unscaled."""
        return mixing(self.mix, self.block, self.seed, "columns", cut=True)
