"""The callback that computes Hessian spectra while a Trainer trains."""

import math
import reprlib
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_sketch.curvature.double_backward import Mode
from hf_sketch.curvature.hessian import HessianOperator
from hf_sketch.curvature.mean_loss import LossFunction, Unit
from hf_sketch.model.sketch import LAYOUTS, ModelSketch
from hf_sketch.processes import Together, check_others, check_same
from hf_sketch.sketches.by_name import OPERATORS
from hf_sketch.sketches.choices import (
    check_choice,
    check_count,
    check_counts,
    check_setting,
)
from hf_sketch.spectra.files import DIRECTORY, continue_spectra, save_spectrum
from hf_sketch.spectra.sketched_hessian import SketchedHessian
from hf_sketch.spectra.spectrum import Spectrum, hessian_spectrum

from .placement import check_processes
from .spectra.batches import kept_batches
from .spectra.shared_hessian import SharedHessian, own_batches

PAPER_STEPS: Final = (0, 10, 50, 100, 150, 200, 250, 500)
PAPER_EVERY: Final = 1000
Value = TypeVar("Value")
_LOGGED_EIGENVALUES: Final = 5
# What can stop a spectrum in the middle of a training that is worth finishing: memory,
# the disk, numbers that are not finite, a kernel, or a setting that is refused.
_SURVIVED: Final = (ArithmeticError, MemoryError, OSError, RuntimeError, ValueError)


@dataclass(eq=False, repr=False)
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
        krylov_dim: Lanczos steps, each a Hessian-vector product; five more measure the
            error bars.
        out_size: length of the sketch; krylov_dim * out_size numbers stay in memory.
        operator: see `ModelSketch`, as for `layout`.
        layout: "blocked" | "grouped" | "factored" | "flat".
        seed: seed of the sketch, the batches and the start vector; by default the
            Trainer's.
        loss_fn: see `HessianOperator`, as for `mode` and `unit`.
        mode: "auto" | "autograd" | "finite_difference".
        unit: "tokens" | "examples".
        keep_vectors: number of eigenvectors kept, those of the largest eigenvalues.

    Raises:
        ValueError: a bad argument.
    """

    steps: Collection[int] | None = None
    every: int | None = None
    _: KW_ONLY
    batches: int | Sequence[Mapping[str, Any]] = 4
    batch_size: int | None = None
    krylov_dim: int = 100
    out_size: int = 2**14
    operator: str = "srht"
    layout: str = "blocked"
    seed: int | None = None
    loss_fn: LossFunction | None = None
    mode: Mode = "auto"
    unit: Unit = "tokens"
    keep_vectors: int = 20

    def __post_init__(self) -> None:
        if self.steps is None and self.every is None:
            self.steps, self.every = PAPER_STEPS, PAPER_EVERY
        steps = () if self.steps is None else self.steps
        check_counts("steps", steps, least=0)
        self.steps = frozenset(steps)
        check_count("every", self.every, optional=True)
        check_count("batch_size", self.batch_size, optional=True)
        check_count("seed", self.seed, least=0, optional=True)
        check_count("keep_vectors", self.keep_vectors, least=0)
        _check_batches(self.batches)
        _check_sizes(self.krylov_dim, self.out_size)
        is_function = self.loss_fn is None or callable(self.loss_fn)
        check_setting("loss_fn", is_function, "a function or None", self.loss_fn)
        check_choice("operator", self.operator, OPERATORS)
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("unit", self.unit, get_args(Unit))
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
        if self.every is None:
            last = state.max_steps
            within = min(self.steps or (), default=math.inf) <= last
            allowed = f"at most {last}, the steps of this run, at least one of them"
            check_setting("steps", within, allowed, sorted(self.steps or ()))
        self._hessian = _together(
            "No Hessian spectra",
            partial(self._prepared, args, state, model, train_dataloader),
        )
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
        due = step in (self.steps or ()) or (self.every and step % self.every == 0)
        if self._hessian is None or not due:
            return
        spectrum = _together(
            f"The Hessian's spectrum of step {step} is missing",
            partial(self._spectrum, self._hessian, args, state),
        )
        if spectrum is None:
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

    def _prepared(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        loader: DataLoader[Any],
    ) -> SketchedHessian:
        """Set up the directory and the batches, and return the operator."""
        seed = args.seed if self.seed is None else self.seed
        check_processes(args, model, type(self).__name__, compiled=True)
        check_others()
        check_same(type(self).__name__, vars(self))
        sketch = ModelSketch.from_model(
            model, self.out_size, self.layout, seed, self.operator
        )
        self._directory = (Path(args.output_dir or ".") / DIRECTORY).resolve()
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
        return SketchedHessian(SharedHessian(hessian, idle), sketch)

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


def _together(missing: str, compute: Callable[[], Value]) -> Value | None:
    """Return what all processes compute; where it fails, say what is missing."""
    try:
        with Together():
            return compute()
    except _SURVIVED as error:
        warnings.warn(
            f"{missing}; training continues. {type(error).__name__}: {error}",
            stacklevel=4,
        )
        return None


def _check_batches(batches: object) -> None:
    """Raise unless these are batches, or their number."""
    if isinstance(batches, int):
        check_count("batches", batches)
    elif (
        not isinstance(batches, Sequence)
        or not batches
        or not all(isinstance(batch, Mapping) for batch in batches)
    ):
        raise ValueError(
            "batches must be the number of batches to draw, or a list of at least one "
            f"input of the model with labels, got {reprlib.repr(batches)}."
        )


def _check_sizes(krylov_dim: int, out_size: int) -> None:
    """Raise unless the sketch has room for the Krylov space."""
    check_count("krylov_dim", krylov_dim)
    check_count("out_size", out_size)
    if krylov_dim > out_size:
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
