"""The search for the least dimension in which fine-tuning reaches a target."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hf_sketch.durable import read_sealed, write_sealed
from hf_sketch.sketches.choices import (
    check_count,
    check_flag,
    check_number,
    check_text,
)

FILE: Final = "intrinsic_dimension.json"
FORMAT_VERSION: Final = 1
_STOPS: Final = ("reached", "exhausted")


@dataclass(frozen=True)
class Stage:
    """What an evaluation at the end of a stage led to.

    Args:
        step: the optimizer step.
        dim: dimensions that were trained up to here.
        metric: what the evaluation gave.
        decision: "start" before the first stage, "reached" the target, "continue" with
            the same dimension, "double" it, or "exhausted" at the largest allowed.
    """

    step: int
    dim: int
    metric: float
    decision: str


@dataclass(frozen=True)
class DimensionSearch:
    """A doubling search: the settings of `IntrinsicDimensionCallback`, and its path.

    Args:
        target: value of the metric to reach.
        metric: name of the metric among those that evaluation gives.
        max_dim: largest dimension of the search.
        stage_steps: optimizer steps between evaluations.
        min_improvement: smallest improvement, in the metric's units, that does not
            double the dimension.
        greater_is_better: whether larger values of the metric are better.
        path: the stages, from the evaluation before training on.

    Raises:
        ValueError: a number is out of range.

    Reference:
        Schioppa 2024, arXiv:2402.03994, Listing 9.
    """

    target: float
    metric: str
    max_dim: int
    stage_steps: int = 2000
    min_improvement: float = 0.0
    greater_is_better: bool = True
    path: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        check_number("target", self.target)
        check_text("metric", self.metric)
        check_count("max_dim", self.max_dim)
        check_count("stage_steps", self.stage_steps)
        check_number("min_improvement", self.min_improvement, least=0)
        check_flag("greater_is_better", self.greater_is_better)

    @property
    def dimension(self) -> int | None:
        """D*, the dimension in which the target was reached; None if it was not."""
        reached = [stage.dim for stage in self.path if stage.decision == "reached"]
        return reached[0] if reached else None

    @property
    def ended(self) -> bool:
        """Whether nothing is left to train."""
        return bool(self.path) and self.path[-1].decision in _STOPS

    def next_dim(self) -> int:
        """Dimensions of the next stage; there must have been one."""
        last = self.path[-1]
        doubled = last.decision == "double"
        return min(2 * last.dim, self.max_dim) if doubled else last.dim

    def after(self, step: int, dim: int, metric: float) -> "DimensionSearch":
        """Return the search with one more evaluation; NaN counts as no improvement."""
        stage = Stage(step, dim, metric, self._decision(dim, metric))
        return dataclasses.replace(self, path=(*self.path, stage))

    def up_to(self, step: int) -> "DimensionSearch":
        """Return the search as it was after a step."""
        kept = tuple(stage for stage in self.path if stage.step <= step)
        return dataclasses.replace(self, path=kept)

    def reaches(self, metric: float) -> bool:
        """Whether a metric is as good as the target."""
        return self._gain(self.target, metric) >= 0

    def _gain(self, before: float, after: float) -> float:
        """How much better a metric became."""
        return after - before if self.greater_is_better else before - after

    def _decision(self, dim: int, metric: float) -> str:
        if not self.path:
            return "start"
        if self.reaches(metric):
            return "reached"
        if self._gain(self.path[-1].metric, metric) >= self.min_improvement:
            return "continue"
        return "double" if dim < self.max_dim else "exhausted"


def target_of(
    target: float | None,
    baseline: float | None,
    greater_is_better: bool = True,
    share: float = 0.9,
) -> float:
    """The metric to reach: as given, or a share of what full fine-tuning reaches.

    Where less is better, the baseline is divided by the share.

    Raises:
        ValueError: both are None, one is not a number, the baseline is negative without
            a target, or full fine-tuning itself does not reach the target.
    """
    check_number("target", target, optional=True)
    check_number("baseline", baseline, optional=True)
    if target is None and baseline is None:
        raise ValueError(
            "the search needs a target, got neither target nor baseline: pass the "
            "metric of full fine-tuning as baseline, of which 90% is the target."
        )
    if target is None:
        assert baseline is not None
        if baseline < 0:
            raise ValueError(
                f"90% of the baseline is a target if it is at least 0, got {baseline}: "
                "pass the target instead."
            )
        return baseline * share if greater_is_better else baseline / share
    sign = 1 if greater_is_better else -1
    if baseline is not None and sign * (target - baseline) > 0:
        raise ValueError(
            f"the target must be one that full fine-tuning reaches, {baseline}, got "
            f"{target}: pass a target up to it, or None for 90% of it."
        )
    return target


def save_dimension_search(output_dir: Path, search: DimensionSearch) -> Path:
    """Write `<output_dir>/intrinsic_dimension.json`.

    Raises:
        OSError: it cannot be written.
    """
    path = output_dir / FILE
    output_dir.mkdir(parents=True, exist_ok=True)
    content = {"format_version": FORMAT_VERSION, "dimension": search.dimension}
    write_sealed(path, {**content, **dataclasses.asdict(search)})
    return path


def load_dimension_search(output_dir: str | Path) -> DimensionSearch:
    """Return the search that `IntrinsicDimensionCallback` left in a Trainer's folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, or of a later version.
    """
    path = Path(output_dir) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"a search is in {path}, got no such file: train with "
            "IntrinsicDimensionCallback, whose output_dir this is."
        )
    content = read_sealed(path, mend="search again", version=FORMAT_VERSION)
    del content["dimension"]  # derived from the path, for readers of the file
    stages = tuple(Stage(**stage) for stage in content.pop("path"))
    return DimensionSearch(**content, path=stages)
