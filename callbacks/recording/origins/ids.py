"""Which rows of the training set a batch is made of."""

import hashlib
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from accelerate.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    IterableDatasetShard,
)
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from .contents import Content

_OWN_BATCHES = 'accelerator_config={"dispatch_batches": False}'


class ExampleIds(Sampler[int]):
    """The row numbers that a training DataLoader draws, batch by batch.

    Takes the place of the loader's sampler, notes what that yields and leaves all else
    to it. The main process draws rows in the order in which their batches arrive, also
    with worker processes. Of several processes that train together, each draws the
    whole order and takes its part of one round after the other. Accelerate fills up the
    last round with rows that were drawn before.

    Args:
        loader: DataLoader of a map-style dataset, as the Trainer gives it to callbacks.
        world_size: number of processes that train together.

    Raises:
        ValueError: the loader has no sampler of row numbers, or its batches may arrive
            in another order.
    """

    def __init__(self, loader: DataLoader[Any], world_size: int = 1) -> None:
        shard = loader.batch_sampler
        own = isinstance(shard, BatchSamplerShard)
        batches = shard.batch_sampler if own else shard
        sampler = getattr(batches, "sampler", None)
        if sampler is None or not isinstance(batches, BatchSampler):
            raise ValueError(
                "Example ids need row numbers drawn by a BatchSampler, got "
                f"{type(loader.dataset).__name__} with {type(batches).__name__}. Pass "
                "a map-style dataset, or per_example=False."
            )
        if world_size > 1 and not own:
            raise ValueError(
                "Example ids need each process to draw its own batches, got "
                f"{type(loader).__name__} in {world_size} processes. Pass "
                f"{_OWN_BATCHES} to TrainingArguments, or per_example=False."
            )
        if loader.num_workers and not loader.in_order:
            raise ValueError(
                "Example ids need batches in the order in which they are drawn, got "
                "dataloader_in_order=False. Leave it out, or pass per_example=False."
            )
        self._loader = loader
        self._batches = batches
        self._sampler: Sampler[int] | Iterable[int] = sampler
        self._drawn: deque[int] = deque()
        self._skip = 0
        self._size = self._round = batches.batch_size
        self._place, self._filled = 0, False
        if own:
            self._share(shard)
        self._batches.sampler = self

    def __iter__(self) -> Iterator[int]:
        for index in self._sampler:
            self._drawn.append(int(index))
            yield index

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "_sampler":  # not set yet, as in a copy that is being made
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def resume(self, steps: int, batches_per_step: int) -> None:
        """Skip the batches that training skips when it resumes after some steps.

        The last step of an epoch may have fewer batches than the others.
        """
        steps_per_epoch = max(-(-len(self._loader) // batches_per_step), 1)
        self._skip = steps % steps_per_epoch * batches_per_step * self._round

    def start_epoch(self) -> None:
        """Forget what the last epoch has drawn and not used."""
        self._drawn.clear()

    def next_batch(self) -> list[int | None]:
        """Return the row numbers of this process's next batch of the epoch.

        None stands for an example that fills up the batch and was used before.
        """
        self._take(self._skip)
        self._skip = 0
        drawn = self._take(self._round)
        own = drawn[self._place : self._place + self._size]
        filling = self._size - len(own) if self._filled else 0
        return [*own, *[None] * filling]

    def close(self) -> None:
        """Give the loader its own sampler back."""
        self._batches.sampler = self._sampler

    def _share(self, shard: BatchSamplerShard) -> None:
        """Note which part of each round is this process's."""
        if shard.split_batches:
            self._size = self._round // shard.num_processes
        else:
            self._round = self._size * shard.num_processes
        self._place = shard.process_index * self._size
        self._filled = shard.even_batches

    def _take(self, count: int) -> list[int]:
        """What was drawn next: fewer where the epoch ends."""
        return [self._drawn.popleft() for _ in range(min(count, len(self._drawn)))]


def followed_ids(
    loader: DataLoader[Any], args: TrainingArguments, resume_step: int
) -> ExampleIds | None:
    """Follow the Trainer's DataLoader; None for a stream, which has no row numbers."""
    loader = getattr(loader, "dataloader", loader)  # within torch_xla's
    check_stream(loader, args.world_size)
    if isinstance(loader.dataset, IterableDataset):
        return None
    ids = ExampleIds(loader, args.world_size)
    if not args.ignore_data_skip:
        ids.resume(resume_step, args.gradient_accumulation_steps)
    return ids


def check_stream(loader: DataLoader[Any], world_size: int) -> None:
    """Raise if processes share a stream, which may repeat examples to fill batches."""
    shared = isinstance(loader, DataLoaderDispatcher)
    if world_size > 1 and (shared or isinstance(loader.dataset, IterableDatasetShard)):
        raise ValueError(
            "Per-example rows of a stream need a part of it per process, but "
            f"{world_size} processes share one. Pass a datasets.IterableDataset of at "
            f"least {world_size} shards and {_OWN_BATCHES} to TrainingArguments, or "
            "per_example=False."
        )


def warn_of_restart(loader: DataLoader[Any], state: TrainerState) -> None:
    """Warn if training resumes in a stream that the Trainer reads from its start."""
    if state.epoch and state.epoch >= 1 and not has_length(loader):
        warnings.warn(
            "Training resumes in a later pass over a stream without a length, and the "
            "Trainer restarts the stream: the examples of the steps after "
            f"{state.global_step} are not those of training that never stopped. Give "
            "the dataset a __len__ to continue where it was.",
            stacklevel=2,
        )


def content_ids(contents: Sequence[Sequence[Content]]) -> list[int | None]:
    """Return ids of a stream's examples: hashes of their own inputs and labels.

    Padding is left out, so that an example keeps its id in every batch.
    """
    ids: list[int | None] = []
    for parts in contents:
        digest = hashlib.blake2b(digest_size=8)
        for part in parts:
            digest.update(part.main + (part.labels or b""))
        ids.append(int.from_bytes(digest.digest(), "little") >> 1)
    return ids
