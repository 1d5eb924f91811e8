"""The batches that curvature is taken of: drawn once, kept beside the spectra."""

import copy
import itertools
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from hf_sketch.durable import replace_file
from hf_sketch.sketches import CounterRandom

_FILE = "batches.safetensors"
_GENERATORS = (
    torch.Generator,
    np.random.Generator,
    np.random.RandomState,
    random.Random,
)
_SHARED = (nn.Module, FunctionType, type)


def draw_batches(
    loader: DataLoader[Any], count: int, batch_size: int, seed: int
) -> list[dict[str, Tensor]]:
    """Batches of random examples of a training set, of a stream's first ones.

    Neither the loader's sampler, nor any global random number, nor a generator that the
    collate function keeps is touched. A stream is iterated once more from its start.

    Args:
        loader: whose dataset and collate function are used.
        count: of batches.
        batch_size: examples in each.
        seed: of the choice, and of what the collate function draws.
    """
    dataset: Any = loader.dataset
    with _own_randomness(seed):
        if isinstance(dataset, IterableDataset):
            examples = list(itertools.islice(dataset, count * batch_size))
        else:
            order = CounterRandom(seed, "curvature-batches").permutation(len(dataset))
            examples = [dataset[i] for i in order[: count * batch_size].tolist()]
        parts = [
            examples[low : low + batch_size]
            for low in range(0, len(examples), batch_size)
        ]
        collate = _twin(loader.collate_fn, {})
        return [tensors_of(collate(part)) for part in parts]


def batches_of(
    given: int | Sequence[Mapping[str, Any]],
    loader: DataLoader[Any],
    batch_size: int,
    seed: int,
) -> list[dict[str, Tensor]]:
    """Batches as given, or as many drawn; see `draw_batches`."""
    if isinstance(given, int):
        return draw_batches(loader, given, batch_size, seed)
    return [tensors_of(batch) for batch in given]


def kept_batches(
    directory: Path, resumed: bool, make: Callable[[], list[dict[str, Tensor]]]
) -> list[dict[str, Tensor]]:
    """Those in a directory if training is resumed, else new ones, which are put there.

    Raises:
        OSError: the directory cannot be written.
        ValueError: the file there is damaged.
    """
    batches = load_batches(directory) if resumed else None
    if batches is None:
        batches = make()
        save_batches(directory, batches)
    return batches


def tensors_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """A batch that can be stored.

    Raises:
        ValueError: it has something that is no tensor.
    """
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"curvature batches must hold tensors, got {type(value).__name__} in "
                f"{name!r}: leave it out, or pass batches= of tensors."
            )
    return dict(batch)


def save_batches(directory: Path, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Put the batches into a directory.

    Raises:
        OSError: it cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{place:06d}/{name}": value.detach().cpu().clone().contiguous()
        for place, batch in enumerate(batches)
        for name, value in batch.items()
    }
    replace_file(directory / _FILE, save(tensors))


def load_batches(directory: Path) -> list[dict[str, Tensor]] | None:
    """The batches in a directory, or None if there are none.

    Raises:
        ValueError: the file is damaged.
    """
    path = directory / _FILE
    if not path.is_file():
        return None
    batches: dict[str, dict[str, Tensor]] = {}
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a safetensors file, got one that is damaged ({error}): "
            f"restore it, or move {directory} away to draw batches anew."
        ) from error
    for key, value in sorted(tensors.items()):
        place, _, name = key.partition("/")
        batches.setdefault(place, {})[name] = value
    return list(batches.values())


def _twin(collate: Any, twins: dict[int, Any]) -> Any:
    """A collate function with generators of its own; all else is shared."""
    if id(collate) in twins:
        return twins[id(collate)]
    if isinstance(collate, _GENERATORS):
        return copy.deepcopy(collate)
    if isinstance(collate, MethodType):
        return MethodType(collate.__func__, _twin(collate.__self__, twins))
    if isinstance(collate, _SHARED) or not getattr(collate, "__dict__", None):
        return collate
    twin = twins[id(collate)] = copy.copy(collate)
    for name, value in vars(collate).items():
        if callable(value) or isinstance(value, _GENERATORS):
            vars(twin)[name] = _twin(value, twins)
    return twin


@contextmanager
def _own_randomness(seed: int) -> Generator[None]:
    """Random numbers of Python, numpy and torch of their own, for a while."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
