"""What is to be recorded, and of which run."""

from dataclasses import dataclass

from hf_sketch.store.rows import check_row_dtype


@dataclass(frozen=True)
class TrainingRun:
    """A run that is to be recorded.

    Args:
        examples: of the training set.
        epochs: passes over it.
        batch_size: examples in a batch of one rank.
        tokens: of an example.
        accumulation: batches in a step.
        ranks: processes that train together, each on examples of its own.
        sharded: whether each holds a part of the model only (FSDP2).
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
            if value is not None and value < 1 and name != "sharded":
                raise ValueError(
                    f"{name} must be at least 1, got {value}: pass 1 or more."
                )

    @property
    def rank_examples(self) -> int:
        """Of one rank in a step."""
        return self.batch_size * self.accumulation

    @property
    def parts(self) -> int:
        """Into which each parameter is split."""
        return self.ranks if self.sharded else 1

    @property
    def steps(self) -> int:
        """Optimizer steps; the last one of an epoch may be short."""
        return self.epochs * -(-self.examples // (self.rank_examples * self.ranks))


@dataclass(frozen=True)
class RowSettings:
    """What `GradientSketchCallback` is given; see there.

    Args:
        out_size: numbers in a sketch.
        layout: "factored" or "blocked".
        operator: of what is not factored.
        row_dtype: what rows are kept in.
        every_steps: record the steps whose number is a multiple of this.
        per_step: record a row for each step.

    Raises:
        ValueError: a setting is unknown, or `every_steps` is below 1.
    """

    out_size: int = 4096
    layout: str = "factored"
    operator: str = "srht"
    row_dtype: str = "float32"
    every_steps: int = 1
    per_step: bool = True

    def __post_init__(self) -> None:
        check_row_dtype(self.row_dtype)
        if self.every_steps < 1:
            raise ValueError(
                f"every_steps must be at least 1, got {self.every_steps}: pass 1 or "
                "more."
            )


@dataclass(frozen=True)
class SpectrumSettings:
    """What `HessianSpectrumCallback` is given; see there.

    Args:
        out_size: numbers in a sketch.
        krylov_dim: Lanczos steps.
        batches: over which the loss is the mean.
    """

    out_size: int = 2**14
    krylov_dim: int = 100
    batches: int = 4
