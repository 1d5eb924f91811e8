"""The one source of random numbers: a function of (seed, role, index)."""

import hashlib
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from hf_sketch.sketches.transforms.lazy import is_lazy

_WORD: Final = 1 << 32
# Constants and shifts of the public-domain integer hash "triple32" (C. Wellons, 2018).
MIX: Final = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
LAST_SHIFT: Final = 14
_PIECE: Final = 1 << 14  # which fits a processor's cache
_WITHOUT_FLOAT64: Final = ("mps", "xla")


@dataclass(frozen=True)
class CounterRandom:
    """Random numbers that are a pure function of (seed, role, index).

    Nothing is stored and no state advances: any slice can be drawn at any time, in any
    process. `words` uses 32-bit integer tensor operations alone, so its bits, and an
    order by them, are the same on every device; the last bit of `normals` need not be.
    The global generator of torch is never touched.

    Args:
        seed: the user's seed.
        role: what the numbers are for; another role gives independent numbers.

    Reference:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (the idea of
        counter-based generators); the mixing function is two keyed rounds of triple32.
    """

    seed: int
    role: str

    @property
    def keys(self) -> tuple[int, int]:
        """Two signed words: that of index i < 2**32 is mix(mix(i ^ first) + second)."""
        text = f"{self.seed}/{self.role}".encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        first = int.from_bytes(digest[:4], "little", signed=True)
        return first, int.from_bytes(digest[4:], "little", signed=True)

    def words(
        self, start: int, count: int, device: torch.device | None = None
    ) -> Tensor:
        """Uniform 32-bit words of the indices start, ..., start + count - 1.

        Shapes:
            returns (count,), int32, every bit a fair coin.
        """
        high, low = divmod(start, _WORD)
        first = min(count, _WORD - low)
        words = self._words_below(high, low, first, device)
        if first == count:
            return words
        rest = self._words_below(high + 1, 0, count - first, device)
        return torch.cat([words, rest])

    def normals(
        self, start: int, count: int, device: torch.device | None = None
    ) -> Tensor:
        """Standard normal numbers of the indices start, ..., start + count - 1.

        Box-Muller in float64, rounded once, so that the last bit does not depend on
        the vector unit that computed it.

        Args:
            start: the first index.
            count: how many.
            device: one with float64; by default the CPU.

        Shapes:
            returns (count,), float32
        """
        result = torch.empty(count, device=device)
        piece = _PIECE if result.is_cpu else max(1, count)
        for low in range(0, count, piece):
            part = result[low : low + piece]
            words = self.words(2 * (start + low), 2 * len(part), device)
            words = words.to(torch.float64)
            uniform = ((words + (_WORD // 2 + 0.5)) / _WORD).view(-1, 2)
            radius = uniform[:, 0].log().mul(-2.0).sqrt()
            part.copy_(radius * uniform[:, 1].mul(2.0 * math.pi).cos())
        return result

    def permutation(self, size: int) -> Tensor:
        """A random order of 0, ..., size - 1.

        Shapes:
            returns (size,), int64, on the CPU.
        """
        return ascending_order(self.words(0, size))

    def _words_below(
        self, high: int, low: int, count: int, device: torch.device | None
    ) -> Tensor:
        """Words of the indices high * 2**32 + low + (0, ..., count - 1)."""
        first_key, second_key = self.keys
        x = torch.arange(count, dtype=torch.int32, device=device)
        x.add_(_signed(low)).bitwise_xor_(first_key)
        return _mix(_mix(x).add_(_signed(second_key ^ (high * 0x9E3779B1))))


def drawing(device: torch.device) -> torch.device:
    """Return where numbers for a device are drawn: there, unless it lacks float64."""
    return torch.device("cpu") if device.type in _WITHOUT_FLOAT64 else device


def ascending_order(words: Tensor) -> Tensor:
    """`words.argsort(stable=True)` along the last dimension, in a tenth of the time.

    Each word is sorted with its place in the bits below.

    Shapes:
        (..., n), int32 -> the same, int64
    """
    bits = max(1, (words.shape[-1] - 1).bit_length())
    places = torch.arange(words.shape[-1], device=words.device)
    keyed = (words.to(torch.int64) << bits) | places
    if not words.is_cpu:
        return keyed.sort(dim=-1).values & ((1 << bits) - 1)
    return torch.from_numpy(np.sort(keyed.numpy())) & ((1 << bits) - 1)


def _signed(value: int) -> int:
    """The low 32 bits of `value`, read as a signed integer."""
    return (value + _WORD // 2) % _WORD - _WORD // 2


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every input bit flips half the output."""
    for shift, multiplier in MIX:
        x = _xor_shift(x, shift).mul_(_signed(multiplier))
    return _xor_shift(x, LAST_SHIFT)


def _xor_shift(x: Tensor, shift: int) -> Tensor:
    """X ^ (x >> shift) with the zeros of an unsigned shift."""
    high = x & -(1 << shift) if is_lazy(x) else x  # torch_xla's >> rounds towards zero
    return x ^ ((high >> shift) & ((1 << (32 - shift)) - 1))
