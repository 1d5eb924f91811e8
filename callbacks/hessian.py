"""The callback that computes Hessian spectra while a Trainer trains."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_sketch.curvature.double_backward import Mode, check_mode
from hf_sketch.curvature.hessian import HessianOperator
from hf_sketch.curvature.mean_loss import LossFunction, Unit, check_unit
from hf_sketch.model.sketch import ModelSketch, check_layout
from hf_sketch.processes import Together, check_others, check_same
from hf_sketch.sketches.by_name import check_operator
from hf_sketch.spectra.files import DIRECTORY, continue_spectra, save_spectrum
from hf_sketch.spectra.sketched_hessian import SketchedHessian
from hf_sketch.spectra.spectrum import Spectrum, hessian_spectrum

from .placement import check_processes
from .spectra.batches import kept_batches
from .spectra.shared_hessian import SharedHessian, own_batches

PAPER_STEPS: Final = (0, 10, 50, 100, 150, 200, 250, 500)
PAPER_EVERY: Final = 1000
_LOGGED_EIGENVALUES: Final = 5
# What can stop a spectrum in the middle of a training that is worth finishing: memory,
# the disk, numbers that are not finite, a kernel, or a setting that is refused.
_SURVIVED: Final = (ArithmeticError, MemoryError, OSError, RuntimeError, ValueError)


class HessianSpectrumCallback(TrainerCallback):
    """Compute the Hessian's spectrum at some steps, into `<output_dir>/curvature`.

    The Hessian is that of the mean loss over a fixed set of batches, in eval mode, at
    the parameters after the step. Training is bit for bit what it is without the
    callback. Where a spectrum fails for lack of memory or disk, for a number that is
    not finite or an unsupported model, the callback warns and training continues; an
    error in the code of `loss_fn` (TypeError, KeyError, ...) ends it.

    Open the spectra with `hf_sketch.load_spectra(output_dir)`. Training that resumes
    from a checkpoint drops later spectra and uses the same batches. The largest
    eigenvalues, RNEG, outliers and alignment go to `state.log_history`. Call
    `set_trainer(trainer)` to also log to W&B, TensorBoard, ...

    Several processes share the batches, add up their products of `out_size` numbers,
    and fail together; the first one writes. Each must hold the whole model.

    Args:
        steps: steps after which to compute a spectrum, 0 for the start; with neither
            `steps` nor `every`, the paper's: 0, 10, 50, 100, 150, 200, 250, 500, and
            every 1,000.
        every: compute a spectrum every `every` steps, and at the start.
        batches: inputs of the model with labels, or the number of batches to draw from
            the training set, once.
        batch_size: examples per drawn batch; by default the Trainer's per device.
        krylov_dim: Lanczos steps, each a Hessian-vector product.
        out_size: length of the sketch; krylov_dim * out_size numbers stay in memory.
        operator: see `ModelSketch`, as for `layout`.
        layout: "blocked" | "factored" | "flat".
        seed: seed of the sketch, the batches and the start vector; by default the
            Trainer's.
        loss_fn: see `HessianOperator`, as for `mode` and `unit`.
        mode: "auto" | "autograd" | "finite_difference".
        unit: "tokens" | "examples".
        keep_vectors: number of eigenvectors kept, those of the largest eigenvalues.

    Raises:
        ValueError: a bad argument.
    """

    def __init__(
        self,
        steps: Sequence[int] | None = None,
        every: int | None = None,
        *,
        batches: int | Sequence[Mapping[str, Any]] = 4,
        batch_size: int | None = None,
        krylov_dim: int = 100,
        out_size: int = 2**14,
        operator: str = "affd",
        layout: str = "blocked",
        seed: int | None = None,
        loss_fn: LossFunction | None = None,
        mode: Mode = "auto",
        unit: Unit = "tokens",
        keep_vectors: int = 20,
    ) -> None:
        if steps is None and every is None:
            steps, every = PAPER_STEPS, PAPER_EVERY
        _check_counts(1, every=every, batches=batches, batch_size=batch_size)
        _check_counts(0, keep_vectors=keep_vectors, steps=min(steps or (0,)))
        _check_sizes(batches, krylov_dim, out_size)
        _check_choices(operator, layout, mode, unit)
        self.steps = frozenset(steps or ())
        self.every = every
        self.batches = batches
        self.batch_size = batch_size
        self.krylov_dim = krylov_dim
        self.out_size = out_size
        self.operator = operator
        self.layout = layout
        self.seed = seed
        self.loss_fn = loss_fn
        self.mode: Mode = mode
        self.unit: Unit = unit
        self.keep_vectors = keep_vectors
        self._trainer: Trainer | None = None
        self._hessian: SketchedHessian | None = None
        self._directory = Path()

    def set_trainer(self, trainer: Trainer) -> None:
        """Log through this Trainer, to everything it reports to."""
        self._trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        train_dataloader: DataLoader[Any],
        **kwargs: Any,
    ) -> None:
        self._hessian = None
        try:
            self._prepare(args, state, model, train_dataloader)
        except _SURVIVED as error:
            warnings.warn(
                "No Hessian spectra; training continues. "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
            return
        if state.global_step == 0:
            self.on_step_end(args, state, control)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Compute, write and log a spectrum, if one is due at this step."""
        step = state.global_step
        due = step in self.steps or (self.every is not None and step % self.every == 0)
        if self._hessian is None or not due:
            return
        try:
            with Together():
                spectrum = self._spectrum(self._hessian, args, state)
        except _SURVIVED as error:
            warnings.warn(
                f"The Hessian's spectrum of step {step} is missing; training continues."
                f" {type(error).__name__}: {error}",
                stacklevel=2,
            )
            return
        logs = _logs(spectrum)
        if self._trainer is None:
            state.log_history.append({**logs, "epoch": state.epoch, "step": step})
        else:
            should_log = control.should_log  # the step's own loss, after this
            self._trainer.log(logs)
            control.should_log = should_log

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._hessian = None

    def _prepare(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        loader: DataLoader[Any],
    ) -> None:
        """Set up the operator, the directory and the batches, in all processes."""
        seed = args.seed if self.seed is None else self.seed
        with Together():
            check_processes(args, model, type(self).__name__, compiled=True)
            check_others()
            check_same(type(self).__name__, vars(self))
            sketch = ModelSketch.from_model(
                model, self.out_size, self.layout, seed, self.operator
            )
            self._directory = Path(args.output_dir or ".") / DIRECTORY
            batches = None
            if state.is_world_process_zero:
                continue_spectra(self._directory, sketch, state.global_step)
                size = self.batch_size or args.per_device_train_batch_size
                resumed = bool(state.global_step)
                batches = kept_batches(
                    self._directory, resumed, self.batches, loader, size, seed
                )
            check_others()
            own, idle = own_batches(batches, args.device)
            hessian = HessianOperator(
                model, own, self.loss_fn, mode=self.mode, unit=self.unit
            )
        self._hessian = SketchedHessian(SharedHessian(hessian, idle), sketch)

    def _spectrum(
        self, hessian: SketchedHessian, args: TrainingArguments, state: TrainerState
    ) -> Spectrum:
        """Compute the spectrum; the first process writes it."""
        first = state.is_world_process_zero
        spectrum = hessian_spectrum(
            hessian,
            self.krylov_dim,
            step=state.global_step,
            keep_vectors=self.keep_vectors,
            seed=hessian.model_sketch.seed,
            progress=first and not args.disable_tqdm,
        )
        if first:
            save_spectrum(self._directory, spectrum)
        return spectrum


def _check_choices(operator: str, layout: str, mode: str, unit: str) -> None:
    """Raise unless each is the name of one."""
    check_operator(operator)
    check_layout(layout)
    check_mode(mode)
    check_unit(unit)


def _check_counts(least: int, **counts: Any) -> None:
    """Raise unless all that are numbers are large enough."""
    for name, value in counts.items():
        if isinstance(value, int) and value < least:
            raise ValueError(
                f"{name} must be at least {least}, got {value}: pass {least} or more."
            )


def _check_sizes(
    batches: int | Sequence[Mapping[str, Any]], krylov_dim: int, out_size: int
) -> None:
    """Raise unless there are batches, and the sketch has room for the Krylov space."""
    if not isinstance(batches, int) and not batches:
        raise ValueError(
            "batches must hold at least one batch, got none: pass inputs of the model "
            "with labels, or the number of batches to draw."
        )
    if not 1 <= krylov_dim <= out_size:
        raise ValueError(
            f"krylov_dim must be in [1, out_size={out_size}], got {krylov_dim}: pass a "
            "smaller krylov_dim, or a larger out_size."
        )


def _logs(spectrum: Spectrum) -> dict[str, float]:
    """Return the statistics that are logged."""
    largest = spectrum.eigenvalues.flip(0)[:_LOGGED_EIGENVALUES]
    logs = {
        f"curvature_eigenvalue_{place}": value
        for place, value in enumerate(largest.tolist(), start=1)
    }
    logs |= {
        "curvature_least_eigenvalue": float(spectrum.eigenvalues[0]),
        "curvature_rneg": spectrum.rneg,
        "curvature_outliers": float(spectrum.outliers),
        "curvature_alignment": spectrum.alignment,
        "curvature_trace": spectrum.trace.value,
    }
    return {name: value for name, value in logs.items() if math.isfinite(value)}
