"""Images, videos and sounds of a batch, which lie end to end in one input."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
_SIZES = "_sizes"  # inputs with the height and the width of each image
_TILED = 5  # dimensions of (images, tiles, channels, height, width), or of
# (examples, images, channels, height, width), with zeros where there is none
_TILES = "tiles of "

Starts = tuple[int, ...]


@dataclass(frozen=True)
class Media:
    """Which rows of a batch's images, videos and sounds belong to which example.

    Empty unless examples have unequally many rows of something.

    Args:
        starts: for each input with rows end to end, its name, the rows at which
            examples start, and the number of rows. Also of tiles, without those that
            are zero, and, under "", of what the model puts in place of the tokens.
        unknown: inputs whose examples are unknown.
    """

    starts: tuple[tuple[str, Starts], ...] = ()
    unknown: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        """Return whether examples have unequally many rows of something."""
        return bool(self.starts or self.unknown)

    @property
    def kind(self) -> object:
        """What rules depend on: what is uneven, and what has a row per example.

        No two batches are of one kind if anything is unknown.
        """
        if self.unknown:
            return object()
        return frozenset(
            (name, starts[-1] == len(starts) - 1)
            for name, starts in self.starts
            if _are_uneven(starts)
        )

    def within(self, length: int) -> set[Starts]:
        """Return the ways in which this number of rows may belong to examples."""
        return {starts for _, starts in self.starts if starts[-1] == length}

    def lacks(self, name: str, first: int, count: int) -> bool:
        """Return whether some examples have nothing but zeros of a tiled input."""
        tiles = dict(self.starts).get(_TILES + name)
        return tiles is not None and tiles[first] == tiles[first + count]

    def some(self, first: int, count: int) -> "Media":
        """Return what holds for some of the examples."""
        starts = tuple(
            (name, tuple(start - own[0] for start in own))
            for name, all_starts in self.starts
            for own in [all_starts[first : first + count + 1]]
        )
        return _unless_even(starts, self.unknown)


NO_MEDIA = Media()


def placeholders_of(model: nn.Module) -> dict[str, int]:
    """Return the tokens in whose places a model puts images, videos and sounds."""
    config: Any = getattr(model, "config", None)
    found: dict[str, int] = {}
    for kind in _KINDS:
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            if isinstance(token := getattr(config, name, None), int):
                found[kind] = token
    return found


def media_of(
    inputs: Mapping[str, Any], tokens: Tensor, placeholders: Mapping[str, int]
) -> Media:
    """Find whose images, videos and sounds a batch holds.

    Shapes:
        tokens (b, t)
    """
    starts: list[tuple[str, Starts]] = []
    unknown = frozenset[str]()
    for kind, token in placeholders.items():
        own = {
            name: x
            for name, x in inputs.items()
            if isinstance(x, Tensor) and _kind_of(name) == kind
        }
        places = tokens == token
        if own and bool(places.any()):
            found = _Owners(own, places).all_starts()
            starts += [(name, some) for name, some in found.items() if some is not None]
            unknown |= {name for name, some in found.items() if some is None}
    return _unless_even(tuple(starts), unknown)


class _Owners:
    """The inputs of one kind, and the tokens in whose places the model puts them.

    Args:
        inputs: inputs by name.
        places: (b, t), whether a token is one of those.
    """

    def __init__(self, inputs: Mapping[str, Tensor], places: Tensor) -> None:
        self._size, self._counts = len(places), places.sum(1).tolist()
        self._inputs = {  # without masks of tokens
            name: x
            for name, x in inputs.items()
            if x.dim() > 3 or (x.dim() > 1 and x.shape[:2] != places.shape)
        }
        # How many rows examples may have: as the batch says, or one per run of tokens.
        begun = places[:, :1].sum(1) + (places[:, 1:] & ~places[:, :-1]).sum(1)
        self._numbers: list[list[int]] = [
            x.tolist()
            for x in inputs.values()
            if x.dim() == 1 and len(x) == self._size and not x.is_floating_point()
        ]
        self._numbers.append(begun.tolist())
        self._tiles: dict[str, list[int]] = {
            name: x.flatten(2).any(2).sum(1).tolist()
            for name, x in self._inputs.items()
            if x.dim() >= _TILED
        }
        self._stacked = any(self._fits(tiles) for tiles in self._tiles.values())

    def all_starts(self) -> dict[str, Starts | None]:
        """Return where examples start in each input, with their number of rows."""
        if not self._inputs:
            return {}
        found: dict[str, Starts | None] = {"": _summed(self._counts)}
        for name, x in self._inputs.items():
            starts = found[name] = self._starts(name, x)
            if starts is not None and name in self._tiles:
                tiles = _summed(self._tiles[name])
                found[_TILES + name] = tuple(tiles[start] for start in starts)
        return found

    def _starts(self, name: str, x: Tensor) -> Starts | None:
        """Return where examples start in an input; None if that is unknown."""
        rows = len(x)
        if rows == self._size and (self._stacked or all(self._counts)):
            return _summed([1] * rows)
        for each in self._numbers:
            if sum(each) == rows and self._fits(each):
                return _summed(each)
        if name.endswith(_GRIDS):
            return self._in_proportion(x.prod(1).tolist())
        sizes = [
            given.prod(1).tolist()
            for other, given in self._inputs.items()
            if other.endswith(_SIZES)
            and len(given) == rows
            and bool((given != given[0]).any())
        ]
        return self._in_proportion(sizes[0] if sizes else [1] * rows)

    def _in_proportion(self, shares: Sequence[int]) -> Starts | None:
        """Return starts such that rows have their shares of the tokens."""
        sums, ends = _summed(shares), _summed(self._counts)
        starts: list[int] = []
        for end in ends:
            place, rest = divmod(sums[-1] * end, ends[-1])
            if rest or place not in sums:
                return None
            starts.append(sums.index(place))
        return tuple(starts)

    def _fits(self, numbers: Sequence[int]) -> bool:
        """Return whether each example with tokens has some rows, and no other."""
        return [bool(x) for x in numbers] == [bool(x) for x in self._counts]


def _unless_even(
    starts: tuple[tuple[str, Starts], ...], unknown: frozenset[str]
) -> Media:
    """Return nothing of a batch whose examples have equally many rows of all."""
    uneven = unknown or any(_are_uneven(some) for _, some in starts)
    return Media(starts, unknown) if uneven else NO_MEDIA


def _are_uneven(starts: Starts) -> bool:
    """Return whether some examples have more rows than others."""
    return len({end - start for start, end in pairwise(starts)}) > 1


def _summed(numbers: Sequence[int]) -> Starts:
    """Return the sums of the first numbers, from none to all."""
    return (0, *accumulate(numbers))


def _kind_of(name: str) -> str | None:
    """Return of which kind an input is."""
    kinds = (k for k, words in _KINDS.items() if any(word in name for word in words))
    return next(kinds, None)
