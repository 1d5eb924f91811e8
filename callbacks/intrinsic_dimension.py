"""The doubling search for the intrinsic dimension, in one run of the Trainer."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch.optim import Optimizer
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_sketch.processes import Together, check_others, check_same, of_first
from hf_sketch.sketches.choices import check_count, check_setting
from hf_sketch.subspace.growth import grow_subspace, subspace_of
from hf_sketch.subspace.search import (
    FILE,
    DimensionSearch,
    load_dimension_search,
    save_dimension_search,
    target_of,
)
from hf_sketch.subspace.tuner import SubspaceModel

from .ddp_wrapper import DdpWrapper
from .placement import check_processes


class IntrinsicDimensionCallback(TrainerCallback):
    """Doubles a subspace adapter's dimension until a metric reaches a target.

    The Trainer evaluates before the first step and after each `stage_steps`. Reaching
    the target stops training: the dimension is D*, the intrinsic dimension up to a
    factor of two. An evaluation better by less than `min_improvement` than the one
    before doubles the dimension by `grow_subspace`, which says what becomes of the
    optimizer's moments and of the step size.

        model = get_peft_model(model, SubspaceConfig(dim=2**4, max_dim=2**16))
        search = IntrinsicDimensionCallback(metric="eval_accuracy", baseline=0.89)
        Trainer(model, args, ..., callbacks=[search]).train()
        load_dimension_search(args.output_dir).dimension

    The path is in `<output_dir>/intrinsic_dimension.json` and in `state.log_history`.
    A run resumed from a checkpoint goes on where that was written. Several processes
    follow the first one's metric and grow together; see `DdpWrapper` for how.

    Args:
        target: see `DimensionSearch`, as for `metric`, `stage_steps`, `min_improvement`
            and `greater_is_better`; by default 90% of `baseline`.
        start_dim: dimension of the first stage; by default the adapter's.
        max_dim: dimension of the last stage; by default the adapter's `max_dim`.
        baseline: the metric of full fine-tuning.

    Raises:
        ValueError: there is no target, full fine-tuning does not reach it, a number is
            out of range; when training begins: the subspace is smaller than `max_dim`,
            evaluation does not give the metric, or an earlier search in `output_dir`
            that is resumed had other settings.
        TypeError: when training begins, the model has no subspace adapter.

    Reference:
        Schioppa 2024, arXiv:2402.03994, section 4 and Listing 9.
    """

    def __init__(
        self,
        target: float | None = None,
        metric: str = "eval_accuracy",
        start_dim: int | None = None,
        max_dim: int | None = None,
        stage_steps: int = 2000,
        min_improvement: float = 0.0,
        greater_is_better: bool = True,
        baseline: float | None = None,
    ) -> None:
        goal = target_of(target, baseline, greater_is_better)
        check_count("start_dim", start_dim, optional=True)
        check_count("max_dim", max_dim, optional=True)
        settings = stage_steps, min_improvement, greater_is_better
        self._search = DimensionSearch(goal, metric, max_dim or 1, *settings)
        self._start_dim = start_dim
        self._max_dim = max_dim
        self._directory = Path()
        self._given: list[str] = []
        self._ddp: DdpWrapper | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        tuner = subspace_of(kwargs["model"])
        self._directory = Path(args.output_dir or ".").resolve()
        stage, last = self._search.stage_steps, state.max_steps
        allowed = f"at most {last}, the steps of this run"
        check_setting("stage_steps", stage <= last, allowed, stage)
        if args.world_size > 1:
            check_processes(args, kwargs["model"], type(self).__name__)
            given = {"start_dim": self._start_dim, "max_dim": self._max_dim}
            check_same(type(self).__name__, vars(self._search) | given)
            self._ddp = DdpWrapper(kwargs["model"])
        largest: int = tuner.model_sketch.out_size
        if self._max_dim is not None and self._max_dim > largest:
            raise ValueError(
                f"max_dim must be at most {largest}, the adapter's, got "
                f"{self._max_dim}: make it with SubspaceConfig(max_dim={self._max_dim})"
                ", which draws the subspace that the search grows in."
            )
        max_dim = self._max_dim or largest
        self._search = dataclasses.replace(self._search, max_dim=max_dim, path=())
        if state.global_step:
            self._resume(args, state, tuner)
            control.should_training_stop |= self._search.ended
            return
        args.eval_on_start = True
        self._given = []
        start = len(tuner.omega) if self._start_dim is None else self._start_dim
        self._grow(start, **kwargs)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self._search.path:
            raise ValueError(
                f"evaluation must give the metric {self._search.metric!r}, got "
                f"{self._given}: see compute_metrics, and pass one of them as metric."
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.global_step % self._search.stage_steps == 0:
            control.should_evaluate = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        self._given = sorted({*self._given, *metrics})
        search = self._search
        measured = {stage.step for stage in search.path}
        if state.global_step % search.stage_steps or state.global_step in measured:
            return
        value = of_first(metrics.get(search.metric))
        if value is None:
            return
        value = float(value)
        dim = len(subspace_of(kwargs["model"]).omega)
        if not search.path and search.reaches(value):
            warnings.warn(
                f"{search.metric} must be worse than the target of {search.target} "
                f"before training, got {value}: a search from here says nothing; train "
                "the baseline for longer, or pass a better target.",
                stacklevel=2,
            )
        self._search = search = search.after(state.global_step, dim, value)
        self._grow(search.next_dim(), **kwargs)
        control.should_training_stop |= search.ended
        log: dict[str, Any] = {
            "step": state.global_step,
            "epoch": state.epoch,
            "subspace_dim": dim,
            f"subspace_{search.metric}": value,
            "subspace_decision": search.path[-1].decision,
        }
        state.log_history.append(log)
        with Together():
            if state.is_world_process_zero:
                save_dimension_search(self._directory, search)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, *_: Any, **__: Any
    ) -> None:
        if self._ddp is not None and not self._ddp.found:
            raise RuntimeError(
                f"the search in {args.world_size} processes needs the model in "
                "DistributedDataParallel, got none that was called: launch it in one "
                "process."
            )

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self._ddp is not None:
            self._ddp.close()

    def _grow(
        self, dim: int, *, model: PeftModel, optimizer: Optimizer, **_: Any
    ) -> None:
        """Grow the subspace, and give DDP the new parameters."""
        before = subspace_of(model).omega
        grow_subspace(model, dim, optimizer)
        if self._ddp is not None and subspace_of(model).omega is not before:
            self._ddp.renew()

    def _resume(
        self, args: TrainingArguments, state: TrainerState, tuner: SubspaceModel
    ) -> None:
        """Go on with the search as it was at the checkpoint."""
        with Together():
            stored = None
            if state.is_world_process_zero:
                stored = load_dimension_search(self._directory)
            check_others()
            search = of_first(stored)
        assert search is not None
        search = search.up_to(state.global_step)
        settings = dataclasses.replace(search, path=())
        if settings != self._search:
            raise ValueError(
                f"{FILE} in {args.output_dir} has a search of {settings}, got "
                f"{self._search}: resume with the same settings, or begin in another "
                "output_dir."
            )
        if not search.path or search.next_dim() != len(tuner.omega):
            raise ValueError(
                f"the search was at {search.next_dim() if search.path else 'no'} "
                f"dimensions at step {state.global_step}, got a checkpoint of "
                f"{len(tuner.omega)}: resume from a checkpoint of the same run."
            )
        self._search = search
