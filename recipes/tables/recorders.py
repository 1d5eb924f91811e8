"""What records per-example gradients: during training, or in a pass of its own."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback


@dataclass(frozen=True)
class Recorded:
    """What a recorder left of a pass over a data set.

    Args:
        rows: (b, numbers in a row), those of the first batch's examples, in order.
        row_bytes: bytes per row in the store.
        other_bytes: bytes of everything else in the store.
        covered: names of the trainable parameters whose gradients the rows see.
    """

    rows: Tensor
    row_bytes: float
    other_bytes: int
    covered: frozenset[str]


class Recorder(ABC):
    """Records a row for each example of a data set that is read in order."""

    note = ""

    @abstractmethod
    def recorded(self, examples: int, batch_size: int) -> Recorded:
        """Describe the store after a pass over that many examples."""


class TrainingRecorder(Recorder):
    """Records while a Trainer trains."""

    @abstractmethod
    def attach(self, trainer: Trainer) -> None:
        """Make the Trainer record, into its `output_dir`."""


class PostHocRecorder(Recorder):
    """Records in a pass of its own over the data, at fixed weights."""

    @abstractmethod
    def obstacle(self, model: nn.Module, batch_size: int) -> str | None:
        """Why it cannot run on this model and machine, if it cannot."""

    @abstractmethod
    def collect(
        self, model: nn.Module, loader: DataLoader[Any], directory: Path
    ) -> list[float]:
        """Record all batches; the seconds of each after the first."""


class Ours(TrainingRecorder):
    """GradientSketchCallback, by default with rows per example only."""

    def __init__(self, out_size: int, layout: str, per_step: bool = False) -> None:
        self._callback = GradientSketchCallback(
            out_size, layout=layout, per_step=per_step, seed=0
        )
        self.note = (
            f"layout={layout!r}, {out_size} numbers, float32; the peak is with the "
            "measuring of its error on exact gradients, in the first step"
        )

    def attach(self, trainer: Trainer) -> None:
        self._store = Path(trainer.args.output_dir) / "sketches"
        trainer.add_callback(self._callback)

    def recorded(self, examples: int, batch_size: int) -> Recorded:
        sketches = load_sketches(self._store)
        first = sketches.where(step=1).dataset.with_format("torch")
        rows = first["sketch"][:][first["example_id"][:].argsort()]
        shards = self._store.glob("per_example-*.arrow")
        shard_bytes = sum(shard.stat().st_size for shard in shards)
        others = bytes_below(self._store) - shard_bytes
        covered = frozenset(sketches.model_sketch.coverage().parameters)
        return Recorded(rows, shard_bytes / examples, others, covered)


def names_of(model: nn.Module, parameters: Iterable[Tensor]) -> frozenset[str]:
    """The names that the model has for some of its parameters."""
    sought = {id(parameter) for parameter in parameters}
    return frozenset(n for n, p in model.named_parameters() if id(p) in sought)


def bytes_below(directory: Path) -> int:
    """The sizes of all files in a directory."""
    return sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())


def intervals(ends: Iterable[float]) -> list[float]:
    """From each time to the next."""
    return [after - before for before, after in pairwise(ends)]
