"""Images, videos and sounds of a batch, which lie end to end in one input."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor, nn

# Of each kind: what stands in the names of its inputs.
_KINDS = {
    "video": ("video",),
    "audio": ("audio", "feature"),
    "image": ("image", "pixel"),
}
_GRIDS = "_grid_thw"  # inputs with the size of each image: its numbers of patches
_STACKED = 5  # dimensions of a batch (examples, images, channels, height, width)

Starts = tuple[int, ...]


def placeholders_of(model: nn.Module) -> dict[str, int]:
    """Return the tokens in whose places a model puts images, videos and sounds."""
    config: Any = getattr(model, "config", None)
    found: dict[str, int] = {}
    for kind in _KINDS:
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            if isinstance(token := getattr(config, name, None), int):
                found[kind] = token
    return found


def uneven_inputs(
    inputs: Mapping[str, Any], tokens: Tensor, placeholders: Mapping[str, int]
) -> tuple[tuple[str, Starts], ...]:
    """Return the inputs of which examples have unequally many rows.

    An example's share of them is that of its placeholders in all of the batch's.

    Shapes:
        tokens (b, t)

    Returns:
        their names, with the rows at which examples start, and the number of rows.
        Under "", the same of what the model puts in place of the tokens.
    """
    found: list[tuple[str, Starts]] = []
    for kind, token in placeholders.items():
        own = {
            name: x
            for name, x in inputs.items()
            if isinstance(x, Tensor) and x.dim() > 1 and _kind_of(name) == kind
        }
        counts = (tokens == token).sum(1).tolist() if own else []
        if not any(counts):
            continue
        ends = [0, *accumulate(counts)]
        starts = {name: _starts(name, x, ends) for name, x in own.items()}
        found += [(n, s) for n, s in starts.items() if s is not None and are_uneven(s)]
        if are_uneven(ends):
            found.append(("", tuple(ends)))
    return tuple(found)


def are_uneven(starts: Sequence[int]) -> bool:
    """Return whether some examples have more rows than others."""
    return len({end - start for start, end in pairwise(starts)}) > 1


def _kind_of(name: str) -> str | None:
    """Return of which kind an input is."""
    kinds = (k for k, words in _KINDS.items() if any(word in name for word in words))
    return next(kinds, None)


def _starts(name: str, x: Tensor, ends: Sequence[int]) -> Starts | None:
    """Return where examples start, given the ends of their placeholders.

    None if they do not lie end to end.
    """
    if x.dim() >= _STACKED and len(x) == len(ends) - 1:
        return None
    sizes = x.prod(1).tolist() if name.endswith(_GRIDS) else None
    sums = None if sizes is None else [0, *accumulate(sizes)]
    total = len(x) if sums is None else sums[-1]
    starts: list[int] = []
    for end in ends:
        place, rest = divmod(total * end, ends[-1])
        if rest or (sums is not None and place not in sums):
            return None
        starts.append(place if sums is None else sums.index(place))
    return tuple(starts)
