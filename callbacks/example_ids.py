"""Which rows of the training set a batch is made of."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler

from hf_sketch.example_split import ExampleSplit


class ExampleIds:
    """Follows the row numbers that a training DataLoader draws, batch by batch.

    Rows are drawn in the main process, in the order in which their batches arrive,
    also with worker processes; the loader's sampler is wrapped to note them on the way.

    Args:
        loader: the DataLoader of a map-style dataset, as the Trainer hands it to
            callbacks.

    Raises:
        ValueError: the loader has no sampler of row numbers.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        batches = loader.batch_sampler
        sampler = getattr(batches, "sampler", None)
        if sampler is None or not isinstance(batches, BatchSampler):
            raise ValueError(
                "example ids need a dataset with row numbers and a BatchSampler, got "
                f"{type(loader.dataset).__name__} with {type(batches).__name__}: pass a"
                " map-style dataset, or per_example=False."
            )
        self._batches = batches
        self._sampler: Sampler[int] | Iterable[int] = sampler
        self._drawn: deque[int] = deque()
        self._skip = 0
        self._batches.sampler = _Noting(sampler, self._drawn)

    def start_epoch(self, skipped_batches: int) -> None:
        """Forget the last epoch; the new one starts after `skipped_batches` batches."""
        self._drawn.clear()
        self._skip = skipped_batches * self._batches.batch_size

    def next_batch(self) -> list[int]:
        """The row numbers of the next batch of the epoch."""
        for _ in range(self._skip):
            self._drawn.popleft()
        self._skip = 0
        size = min(self._batches.batch_size, len(self._drawn))
        return [self._drawn.popleft() for _ in range(size)]

    def close(self) -> None:
        """Give the loader its own sampler back."""
        self._batches.sampler = self._sampler


def content_ids(
    inputs: Mapping[str, Any], split: ExampleSplit, main_input: str
) -> list[int]:
    """Ids of the examples of a stream: hashes of their own inputs and labels.

    Padding (attention_mask 0, label -100) is left out, so that an example keeps its id
    in every batch.
    """
    mask = inputs.get("attention_mask")
    ids: list[int] = []
    for index in range(split.size):
        digest = hashlib.blake2b(digest_size=8)
        own = split.part(inputs[main_input], index)
        if isinstance(mask, Tensor) and mask.shape == inputs[main_input].shape:
            own = own[split.part(mask, index) != 0]
        digest.update(own.cpu().numpy().tobytes())
        if isinstance(inputs.get("labels"), Tensor):
            labels = split.part(inputs["labels"], index)
            digest.update(labels[labels != -100].cpu().numpy().tobytes())
        ids.append(int.from_bytes(digest.digest(), "little") >> 1)
    return ids


class _Noting(Sampler[int]):
    """A sampler that notes what it yields; all else is the inner sampler's."""

    def __init__(self, sampler: Iterable[int], drawn: deque[int]) -> None:
        self.sampler = sampler
        self._drawn = drawn

    def __iter__(self) -> Iterator[int]:
        for index in self.sampler:
            self._drawn.append(int(index))
            yield index

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)
