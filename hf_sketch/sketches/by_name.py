"""Operators by name, with blocks that suit the sizes."""

import math

from hf_sketch.sketches import AFFD, AFJL, FFD, FJL, QK, SRHT, Dense, Grouped, Sketch
from hf_sketch.sketches.operator import next_power_of_two

_IN_BLOCKS = {"affd": AFFD, "afjl": AFJL, "fjl": FJL, "srht": SRHT}
_WHOLE = {"dense": Dense, "ffd": FFD, "qk": QK}
OPERATORS = (*_IN_BLOCKS, *_WHOLE)
_BLOCK_SIZE = 2**16
_ROTATED_BLOCK_SIZE = 2**10
_GROUP_BITS = 6  # the most groups are 2**6: rotations cost more with each


def choose_operator(
    name: str, in_size: int, out_size: int, seed: int, stream: str, flat: bool
) -> Sketch:
    """The operator of that name for one parameter, or for a whole model (`flat`).

    Blocks have 2**16 elements, fewer for short inputs and more for long sketches; those
    of SRHT, which drops nothing, 2**10, and fewer for short sketches. A flat operator
    has one block.

    Raises:
        ValueError: the sizes do not fit the operator.
    """
    if name in _WHOLE:
        return _WHOLE[name](in_size, out_size, seed, stream=stream)
    if flat:
        return _IN_BLOCKS[name](in_size, out_size, seed, None, stream)
    longest = next_power_of_two(out_size)
    if name == "srht":
        block = min(_ROTATED_BLOCK_SIZE, longest)
    else:
        block = max(min(_BLOCK_SIZE, next_power_of_two(in_size)), longest)
    return _IN_BLOCKS[name](in_size, out_size, seed, block, stream)


def choose_factored(
    layout: str, shape: tuple[int, ...], out_size: int, seed: int, stream: str
) -> Sketch | None:
    """The operator that folds both sides of a weight, as its outer products come.

    "factored" takes matrices that are at least as long as its factors, and "grouped"
    the same, and experts whose matrices are. "grouped" folds to 2**6 groups at most,
    and to a power of two that is no shorter than the side at most; matrices of which
    two groups would not be left have too few elements to gain anything.

    Returns:
        None if the weight is none of these.
    """
    bits = (out_size - 1).bit_length()
    sides = (2 ** (bits // 2), 2 ** (bits - bits // 2))
    long = len(shape) > 1 and shape[-2] >= sides[0] and shape[-1] >= sides[1]
    sizes = math.prod(shape), out_size, seed
    if layout == "factored" and long and len(shape) == 2:
        return QK(*sizes, shape, sides, stream, "signs")
    if layout == "grouped" and long and len(shape) in (2, 3):
        longest = 2 ** min(bits, (bits + _GROUP_BITS) // 2)
        first, second = (min(longest, next_power_of_two(n)) for n in shape[-2:])
        if first * second >= 2 ** (bits + 1):
            return Grouped(*sizes, shape, (first, second), stream)
    return None
