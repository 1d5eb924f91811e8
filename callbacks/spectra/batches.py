"""The batches of the spectra's loss: drawn once, kept beside the spectra."""

import copy
import itertools
import random
from collections.abc import Generator, Mapping, Sequence
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


def kept_batches(
    directory: Path,
    resumed: bool,
    given: int | Sequence[Mapping[str, Any]],
    loader: DataLoader[Any],
    batch_size: int,
    seed: int,
) -> list[dict[str, Tensor]]:
    """Return a directory's batches if training resumes, else store new ones there.

    New ones are those given, or the given number of them, drawn from the training set.

    Raises:
        OSError: the directory cannot be written.
        ValueError: the file there is damaged, or a batch holds anything but tensors.
    """
    kept = _load_batches(directory / _FILE) if resumed else None
    if kept is not None:
        return kept
    if isinstance(given, int):
        given = draw_batches(loader, given, batch_size, seed)
    batches = [tensors_of(batch) for batch in given]
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{place:06d}/{name}": value.detach().cpu().clone().contiguous()
        for place, batch in enumerate(batches)
        for name, value in batch.items()
    }
    replace_file(directory / _FILE, save(tensors))
    return batches


def draw_batches(
    loader: DataLoader[Any], count: int, batch_size: int, seed: int
) -> list[dict[str, Any]]:
    """Draw random examples of a training set, or a stream's first ones, as batches.

    This leaves the loader's sampler, all global random numbers and the generators of
    the collate function as they were. A stream is iterated once more from its start.

    Args:
        loader: its dataset and collate function are used.
        count: number of batches.
        batch_size: examples per batch.
        seed: seed of the choice, and of whatever the collate function draws.
    """
    dataset: Any = loader.dataset
    with own_randomness(seed):
        if isinstance(dataset, IterableDataset):
            examples = list(itertools.islice(dataset, count * batch_size))
        else:
            order = CounterRandom(seed, "curvature-batches").permutation(len(dataset))
            examples = [dataset[i] for i in order[: count * batch_size].tolist()]
        collate = _twin(loader.collate_fn, {})
        return [
            collate(examples[low : low + batch_size])
            for low in range(0, len(examples), batch_size)
        ]


def tensors_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a batch as it can be stored: raise if it holds anything but tensors."""
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"Curvature batches must hold tensors, got {type(value).__name__} in "
                f"{name!r}. Leave it out, or pass batches= of tensors."
            )
    return dict(batch)


def _load_batches(path: Path) -> list[dict[str, Tensor]] | None:
    """Return the batches in a file, or None if there is no file."""
    if not path.is_file():
        return None
    batches: dict[str, dict[str, Tensor]] = {}
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}). Restore it, or move {path.parent} away to "
            "draw new batches."
        ) from error
    for key, value in sorted(tensors.items()):
        place, _, name = key.partition("/")
        batches.setdefault(place, {})[name] = value
    return list(batches.values())


def _twin(collate: Any, twins: dict[int, Any]) -> Any:
    """Copy a collate function with its generators; share everything else."""
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
def own_randomness(seed: int) -> Generator[None]:
    """Seed Python, numpy and torch for a while, then restore their states."""
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
