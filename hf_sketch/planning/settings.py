"""What to record, and of which run."""

from dataclasses import dataclass

from hf_sketch.model.groups import Grouping, check_grouping
from hf_sketch.sketches.choices import check_choice, check_count
from hf_sketch.store.rows import ROW_DTYPES


@dataclass(frozen=True)
class TrainingRun:
    """A training run to record.

    Args:
        examples: examples of the training set.
        epochs: passes over it.
        batch_size: examples per batch and rank.
        tokens: tokens per example.
        accumulation: batches per optimizer step.
        ranks: processes that train together, each on examples of its own.
        sharded: whether each holds only a part of the model (FSDP2).
        save_steps: steps between two checkpoints; None for none.

    Raises:
        ValueError: a number is below 1.
    """

    examples: int
    epochs: int = 1
    batch_size: int = 8
    tokens: int = 1024
    accumulation: int = 1
    ranks: int = 1
    sharded: bool = False
    save_steps: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and name != "sharded":
                check_count(name, value)

    @property
    def rank_examples(self) -> int:
        """Examples per rank and step."""
        return self.batch_size * self.accumulation

    @property
    def parts(self) -> int:
        """The number of parts that each parameter is split into."""
        return self.ranks if self.sharded else 1

    @property
    def steps(self) -> int:
        """Optimizer steps; the last one of an epoch may be short."""
        return self.epochs * -(-self.examples // (self.rank_examples * self.ranks))


@dataclass(frozen=True)
class RowSettings:
    """Settings of `GradientSketchCallback`; see there.

    Args:
        out_size: numbers per sketch.
        layout: "grouped", "blocked" or "factored".
        operator: operator of parameters that are not grouped.
        row_dtype: how rows are stored.
        every_steps: record the steps whose number is a multiple of this.
        per_step: record a row per step as well.
        groups: number of groups of layers, or a pattern for each.

    Raises:
        ValueError: a setting is unknown, or `every_steps` or `groups` is below 1.
    """

    out_size: int = 4096
    layout: str = "grouped"
    operator: str = "srht"
    row_dtype: str = "float32"
    every_steps: int = 1
    per_step: bool = True
    groups: Grouping = 1

    def __post_init__(self) -> None:
        check_choice("row_dtype", self.row_dtype, ROW_DTYPES)
        check_count("every_steps", self.every_steps)
        check_grouping(self.groups)


@dataclass(frozen=True)
class SpectrumSettings:
    """Settings of `HessianSpectrumCallback` that a plan needs; see there.

    Args:
        out_size: numbers per sketch.
        krylov_dim: Lanczos steps.
    """

    out_size: int = 2**14
    krylov_dim: int = 100
