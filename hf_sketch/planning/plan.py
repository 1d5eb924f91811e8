"""What recording a training run will cost, before it starts."""

from dataclasses import dataclass
from typing import Final

from torch import nn

from hf_sketch.model.sketch import ModelSketch
from hf_sketch.planning.batch import BatchShape, batch_cost
from hf_sketch.planning.disk import BUFFER_BYTES, RowFormat, StoreSize, store_size
from hf_sketch.planning.settings import RowSettings, SpectrumSettings, TrainingRun
from hf_sketch.store.rows import PER_EXAMPLE

_FLOAT_BYTES: Final = 4
_CHECK_PRODUCTS: Final = 3  # before the first product of a spectrum
_PRODUCT_VECTORS: Final = 3  # of the model's size: the lifted one, gradient, product
_COMPARED_GRADIENTS: Final = 2  # held at once in the first step


@dataclass(frozen=True)
class SpectrumCost:
    """What one Hessian spectrum takes.

    Args:
        products: products of the Hessian with a vector, those of the check included.
        vector_bytes: vectors of the model's size in one product by autograd; the
            activations of a double backward pass come on top.
        basis_bytes: the Lanczos vectors.
    """

    products: int
    vector_bytes: int
    basis_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a recorded run costs. All is exact but what says that it is an estimate.

    Args:
        elements: numbers that train.
        steps: recorded steps.
        store: rows, files and bytes on disk.
        step_numbers: numbers that one rank sketches per recorded step; an estimate
            where modules are run again per example.
        held_bytes: device memory per rank on top of training's at its peak, where the
            backward pass begins; an estimate.
        first_step_bytes: device memory of the first rank in the first step, for the
            exact gradients that rows are compared with; none in shards.
        host_bytes: memory of the host per rank for rows on their way to disk, at most.
        recording_network_bytes: what each rank puts into all-reduces per recorded step.
        training_network_bytes: the same for training's own gradients.
        spectrum: one of the Hessian's.
        uncounted: paths of modules that `step_numbers` and `held_bytes` leave out.
        step_seconds: seconds that rows add to a recorded step, an estimate; None
            without a rate.
        slowdown: mean time of a step as a multiple of a plain one, an estimate; None
            without a rate and the time of a plain step.
    """

    elements: int
    steps: int
    store: StoreSize
    step_numbers: int
    held_bytes: int
    first_step_bytes: int
    host_bytes: int
    recording_network_bytes: int
    training_network_bytes: int
    spectrum: SpectrumCost
    uncounted: tuple[str, ...] = ()
    step_seconds: float | None = None
    slowdown: float | None = None


def plan_recording(
    model: nn.Module,
    run: TrainingRun,
    rows: RowSettings | None = None,
    spectrum: SpectrumSettings | None = None,
    numbers_per_second: float | None = None,
    plain_step_seconds: float | None = None,
) -> Plan:
    """Return what recording will cost, from the model's shapes alone.

    Args:
        model: on any device, also torch's "meta"; its dtype is the one it computes
            with, and its trainable parameters are those that are sketched.
        run: training run to record.
        rows: rows to record; None for the callback's defaults.
        spectrum: spectrum to compute; None for the callback's defaults.
        numbers_per_second: rate at which a device sketches, as `measured_rate` gives
            it; None for no seconds.
        plain_step_seconds: seconds of a step of plain training; None for no slowdown.

    Raises:
        ValueError: a setting is unknown, or a size does not fit the model.
    """
    rows, spectrum = rows or RowSettings(), spectrum or SpectrumSettings()
    settings = rows.out_size, rows.layout, 0, rows.operator, None, rows.groups
    sketch = ModelSketch.from_model(model, *settings)
    element = next(iter(sketch.parameters_of(model).values())).element_size()
    cost = batch_cost(model, sketch, BatchShape(run.batch_size, run.tokens, element))
    numbers = run.accumulation * cost.numbers
    numbers += rows.per_step * sketch.in_size // run.parts
    seconds = numbers_per_second and numbers / numbers_per_second
    slowdown = None
    if seconds is not None and plain_step_seconds is not None:
        slowdown = 1 + seconds / rows.every_steps / plain_step_seconds
    gradient = sketch.in_size * element
    exchanged = sketch.row_size if run.sharded and run.ranks > 1 else 0
    return Plan(
        elements=sketch.in_size,
        steps=run.steps // rows.every_steps,
        store=_store(run, rows, sketch),
        step_numbers=numbers,
        held_bytes=cost.held_bytes,
        first_step_bytes=0 if run.sharded else _COMPARED_GRADIENTS * gradient,
        host_bytes=BUFFER_BYTES,
        recording_network_bytes=exchanged * _FLOAT_BYTES * rows.per_step,
        training_network_bytes=gradient if run.ranks > 1 else 0,
        spectrum=SpectrumCost(
            spectrum.krylov_dim + _CHECK_PRODUCTS + (element >= _FLOAT_BYTES),
            _PRODUCT_VECTORS * gradient,
            spectrum.krylov_dim * spectrum.out_size * _FLOAT_BYTES,
        ),
        uncounted=cost.uncounted,
        step_seconds=seconds,
        slowdown=slowdown,
    )


def _store(run: TrainingRun, rows: RowSettings, sketch: ModelSketch) -> StoreSize:
    """The files, which each checkpoint ends."""
    saved = run.save_steps and max(1, run.save_steps // rows.every_steps)
    groups = sketch.layer_groups.count
    return store_size(
        RowFormat(PER_EXAMPLE, sketch.row_size, rows.row_dtype, groups),
        rows_a_step=run.rank_examples,
        steps=run.steps // rows.every_steps,
        per_step=rows.per_step,
        ranks=run.ranks,
        flush_steps=saved,
    )
