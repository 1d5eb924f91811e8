"""Operators by name, with blocks that suit the sizes."""

from hf_sketch.sketches import AFFD, AFJL, FFD, FJL, QK, SRHT, Dense, Sketch
from hf_sketch.sketches.operator import next_power_of_two

_IN_BLOCKS = {"affd": AFFD, "afjl": AFJL, "fjl": FJL, "srht": SRHT}
_WHOLE = {"dense": Dense, "ffd": FFD, "qk": QK}
OPERATORS = (*_IN_BLOCKS, *_WHOLE)
_BLOCK_SIZE = 2**16
_ROTATED_BLOCK_SIZE = 2**10


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
