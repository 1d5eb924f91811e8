"""Random signs, kept as 32-bit masks whose top bit is the sign."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hf_sketch.sketches.transforms.lazy import is_lazy
from hf_sketch.sketches.transforms.random import CounterRandom, drawing

ROLES = ("before", "after")  # the transform
RUN = 2**18
RUNS_IN_TABLE = 4


def flip(x: Tensor, masks: Tensor, out: Tensor | None = None) -> Tensor:
    """Flip the signs of x where the masks' top bits are set; shapes broadcast.

    Args:
        x: float32 or float64.
        masks: int32, top bits only.
        out: where the result goes, x itself too; by default memory of its own.
    """
    if is_lazy(x):  # it reads numbers as others by way of the CPU
        flipped = torch.where(masks < 0, -x, x)
        return flipped if out is None else out.copy_(flipped)
    if x.dtype == torch.float64:
        masks = masks.to(torch.int64) << 32
    out = torch.empty_like(x) if out is None else out
    torch.bitwise_xor(x.view(masks.dtype), masks, out=out.view(masks.dtype))
    return out


def sign_masks(
    rng: CounterRandom, start: int, count: int, device: torch.device | None = None
) -> Tensor:
    """Fair signs of the indices start, ..., start + count - 1, 32 to a word.

    Shapes:
        returns (count,), int32: the top bit is the sign, the others are zero
    """
    first = start // 32
    words = rng.words(first, -(-(start + count) // 32) - first, device)
    places = torch.arange(31, -1, -1, dtype=torch.int32, device=device)
    masks = (words.unsqueeze(1) << places).bitwise_and_(-(2**31)).flatten()
    return masks[start - 32 * first :][:count]


@dataclass(frozen=True)
class StreamSigns:
    """The signs of a stream's coordinates, one for each.

    A stream is cut into runs of 2**18 coordinates (or of one block, if that is longer).
    The signs of a run are a slice, at an offset hashed from (stream, run), of one table
    of 2**20 and more signs that all streams of a seed and role share, so that a sign
    costs one read. Within a run all signs are independent. Two blocks of different runs
    share part of their slices with a probability of at most 2 block / table, and then
    with a displacement: their signs are still pairwise uncorrelated.

    Args:
        seed: the user's seed.
        role: "before" or "after" the transform.
        stream: stream of the signs; each stream has its own offset.
        run: length of a run, a multiple of the block.
    """

    seed: int
    role: str
    stream: str
    run: int

    @property
    def keys(self) -> tuple[int, int, int, int]:
        """The keys of the offsets and of the table, for a kernel that draws them."""
        return *self._offsets.keys, *_table_words(self.seed, self.role).keys

    def offsets(self, first_run: int, count: int) -> list[int]:
        """Where the runs first_run, ... lie in the table."""
        words = self._offsets.words(first_run, count) & (RUNS_IN_TABLE * self.run - 1)
        return words.tolist()

    def masks(
        self, offset: int, start: int, count: int, device: torch.device
    ) -> Tensor:
        """Masks of `count` coordinates from place `start` of the run at `offset`."""
        table = _table(self.seed, self.role, self.run, device)
        return table[offset + start : offset + start + count]

    @property
    def _offsets(self) -> CounterRandom:
        return CounterRandom(self.seed, f"offsets-{self.role}/{self.stream}")


@lru_cache(maxsize=8)  # a memo of a pure function: 5 MiB each for runs of 2**18
def _table(seed: int, role: str, run: int, device: torch.device) -> Tensor:
    """The shared signs: (RUNS_IN_TABLE + 1) * run masks."""
    rng = _table_words(seed, role)
    return sign_masks(rng, 0, (RUNS_IN_TABLE + 1) * run, drawing(device)).to(device)


def _table_words(seed: int, role: str) -> CounterRandom:
    return CounterRandom(seed, f"signs-{role}")
