"""The rows that each of several processes reads, and what they find together."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from hf_sketch.attribution.methods import Method
from hf_sketch.processes import processes, reduced
from hf_sketch.store.blocks import CPU, RowBlock, block_rows, row_blocks


def shared_rows(total: int, at_once: int, number: int, count: int) -> range:
    """Return the row numbers of one of `count` shares, which begin where blocks do.

    Args:
        total: number of all rows.
        at_once: rows of a block.
        number: index of the share.
        count: number of shares.
    """
    blocks = -(-total // at_once)
    edges = [(number + i) * blocks // count * at_once for i in (0, 1)]
    return range(min(edges[0], total), min(edges[1], total))


@dataclass(frozen=True)
class RowShare:
    """Rows that this process reads, of those that all read together.

    Args:
        dataset: all rows.
        number: index of this process.
        count: number of processes.
        device: where it multiplies them.
    """

    dataset: Dataset
    number: int = 0
    count: int = 1
    device: torch.device = CPU

    @classmethod
    def of_process(cls, dataset: Dataset) -> "RowShare":
        """The share of this process of those that Accelerate knows of, on its device.

        MPS lacks the float64 of sums, and XLA would compile for each shape.
        """
        state = processes()
        accelerator = torch.accelerator.current_accelerator()
        usable = accelerator is not None and accelerator.type != "mps"
        device = state.device
        if device is None or not usable or device.type == "cpu":
            device = CPU  # without the number that Accelerate gives it
        return cls(dataset, state.process_index, state.num_processes, device)

    @property
    def rows(self) -> range:
        """The numbers of the rows.

        Shares begin where blocks do, so that all products are of the same blocks, and
        the same to the last bit, for any number of processes.
        """
        at_once = block_rows(self.dataset)
        return shared_rows(len(self.dataset), at_once, self.number, self.count)

    def blocks(self, method: Method | None = None) -> Iterator[RowBlock]:
        """The rows in order, with what a method needs of them, under a progress bar."""
        names = set[str]() if method is None else {*method.columns, "step", "weight"}
        rows = self.rows
        part = self.dataset if self.count == 1 else self.dataset.select(rows)
        with tqdm(
            total=len(part), desc="Reading rows", unit="row", disable=self.number > 0
        ) as progress:
            for block in row_blocks(
                part, *sorted(names), start=rows.start, device=self.device
            ):
                yield block
                progress.update(len(block.scale))

    def tell_skipped(self, count: int) -> None:
        """Warn of rows that some process passed over; all must call together."""
        count = int(self.summed(torch.tensor(count)))
        if count:
            warnings.warn(
                f"Skipped {count} rows with a NaN or infinite gradient: those with "
                "finite=False in store.dataset.",
                stacklevel=5,
            )

    def summed(self, x: Tensor) -> Tensor:
        """The sum over the processes; all must call together."""
        if self.count == 1:
            return x
        return reduced(x.to(processes().device), "sum").to(x.device)

    def gathered(self, value: Any) -> list[Any]:
        """What each process has, in the rows' order; all must call together."""
        return [value] if self.count == 1 else gather_object([value])
