"""What recording a training run will cost, told before it starts."""

from dataclasses import dataclass
from typing import Final

from torch import nn

from hf_sketch.model.sketch import ModelSketch
from hf_sketch.planning.cost import (
    BatchShape,
    Work,
    example_work,
    layer_elements,
    step_bytes,
    step_work,
    training_flops,
)
from hf_sketch.planning.disk import BUFFER_BYTES, RowFormat, StoreSize, store_size
from hf_sketch.planning.machine import Machine
from hf_sketch.planning.settings import RowSettings, SpectrumSettings, TrainingRun
from hf_sketch.store.rows import PER_EXAMPLE

_TRAINING_PASSES: Final = 22  # over what layers take and give: GPT-2's in eager mode
_OPTIMIZER_BYTES: Final = 28  # AdamW reads and writes seven numbers for each
_EXCHANGED: Final = 2**10  # numbers by which a step's clipping is told
_MEASURED_EXAMPLES: Final = 8  # whose exact gradients are taken in the first step
_MEASURED_BYTES: Final = 2**28
_SUMS_BYTES: Final = 4
_CHECKS: Final = 3  # products taken before the first of a spectrum
_PRODUCT_GRADIENTS: Final = 4  # of time, by autograd
_PRODUCT_VECTORS: Final = 3  # of the model's size: the lifted one, gradient, product


@dataclass(frozen=True)
class Times:
    """Seconds, all of them estimates.

    Args:
        step_seconds: of a plain step, unless it was given.
        sketch_seconds: that rows add to a recorded step.
        every_steps: of which one is recorded.
        step_examples: of all ranks.
    """

    step_seconds: float
    sketch_seconds: float
    every_steps: int
    step_examples: int

    @property
    def slowdown(self) -> float:
        """Seconds of a step with rows, on the mean, as a multiple of a plain one."""
        return 1 + self.sketch_seconds / self.every_steps / self.step_seconds

    @property
    def plain_rows_per_second(self) -> float:
        """Examples that training without rows meets in a second, on all ranks."""
        return self.step_examples / self.step_seconds

    @property
    def rows_per_second_lost(self) -> float:
        """Examples fewer in a second with rows."""
        return self.plain_rows_per_second * (1 - 1 / self.slowdown)


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank needs beyond those of plain training.

    Args:
        held_bytes: on the device when the backward pass begins, where plain training's
            memory peaks; an estimate.
        working_bytes: on the device at other times; an estimate.
        host_bytes: of rows on their way to the disk, at most.
        first_step_bytes: on the device in the first step, of the first rank alone: of
            exact gradients, which rows are compared with; none in shards.
    """

    held_bytes: float
    working_bytes: float
    host_bytes: int
    first_step_bytes: int


@dataclass(frozen=True)
class Network:
    """Bytes that each rank puts into all-reduces in a step.

    Args:
        recording_bytes: for a recorded step's row; those of examples need none.
        training_bytes: of gradients, for training itself.
    """

    recording_bytes: int
    training_bytes: int


@dataclass(frozen=True)
class SpectrumCost:
    """What one spectrum takes.

    Args:
        products: of the Hessian with a vector.
        product_seconds: of one; an estimate.
        vector_bytes: of vectors of the model's size in a product; the activations of a
            double backward pass come on top.
        basis_bytes: of Lanczos vectors.
    """

    products: int
    product_seconds: float
    vector_bytes: int
    basis_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a recorded run costs. Sizes of files are exact, see each part for others.

    Args:
        elements: that train.
        steps: that are recorded.
        store: the files.
        times: of a step.
        memory: of a rank.
        network: of a step.
        spectrum: one of the Hessian's.
        reading_seconds: of one pass of one process over the store, as attribution
            takes; an estimate.
        uncounted: paths of modules whose work is not in the estimates.
    """

    elements: int
    steps: int
    store: StoreSize
    times: Times
    memory: Memory
    network: Network
    spectrum: SpectrumCost
    reading_seconds: float
    uncounted: tuple[str, ...] = ()


def plan_recording(
    model: nn.Module,
    run: TrainingRun,
    rows: RowSettings | None = None,
    spectrum: SpectrumSettings | None = None,
    machine: Machine | None = None,
    step_seconds: float | None = None,
) -> Plan:
    """What recording will cost, of the model's shapes alone.

    Args:
        model: on any device, also torch's "meta"; its dtype is the one it computes
            with, and its trainable parameters are those that are sketched.
        run: that is to be recorded.
        rows: that are recorded; None for the callback's defaults.
        spectrum: that is taken; None for the callback's defaults.
        machine: of each rank; None for a rough data-centre GPU.
        step_seconds: of a plain step, where it is known; None for an estimate.

    Raises:
        ValueError: a setting is unknown, or a size does not fit the model.
    """
    rows = rows or RowSettings()
    spectrum, machine = spectrum or SpectrumSettings(), machine or Machine()
    sketch = ModelSketch.from_model(model, rows.out_size, rows.layout, 0, rows.operator)
    element = next(iter(sketch.parameters_of(model).values())).element_size()
    batch = BatchShape(run.batch_size, run.tokens, element)
    work = example_work(model, sketch, batch)
    gradient_seconds = batch_seconds(model, batch, machine)
    update = _OPTIMIZER_BYTES * sketch.in_size / run.parts / machine.bytes_per_second
    plain = run.accumulation * gradient_seconds + update
    recorded = work * run.accumulation
    if rows.per_step:
        recorded += step_work(sketch, element, run.parts)
    store = _store(run, rows)
    return Plan(
        elements=sketch.in_size,
        steps=run.steps // rows.every_steps,
        store=store,
        times=Times(
            step_seconds or plain,
            seconds_of(recorded, machine),
            rows.every_steps,
            run.rank_examples * run.ranks,
        ),
        memory=_memory(sketch, work, batch, run, rows.per_step),
        network=_network(sketch, run, rows.per_step, element),
        spectrum=_spectrum(sketch, spectrum, run, gradient_seconds, element),
        reading_seconds=store.total_bytes / machine.disk_bytes_per_second,
        uncounted=work.uncounted,
    )


def seconds_of(work: Work, machine: Machine) -> float:
    """Of a sketch's work, done one thing after the other."""
    return (
        work.flops / machine.float32_flops_per_second
        + work.moved_bytes / machine.bytes_per_second
        + work.calls * machine.seconds_per_call
    )


def batch_seconds(model: nn.Module, batch: BatchShape, machine: Machine) -> float:
    """Of a plain forward and backward pass."""
    elements = batch.all_tokens * layer_elements(model)
    moved = _TRAINING_PASSES * elements * batch.element_bytes
    products = training_flops(model, batch) / machine.flops_per_second
    layers = sum(
        any(True for _ in m.parameters(recurse=False)) for m in model.modules()
    )
    launches = layers * machine.seconds_per_call
    return products + moved / machine.bytes_per_second + launches


def _store(run: TrainingRun, rows: RowSettings) -> StoreSize:
    """The files, which each checkpoint ends."""
    saved = run.save_steps and max(1, run.save_steps // rows.every_steps)
    return store_size(
        RowFormat(PER_EXAMPLE, rows.out_size, rows.row_dtype),
        rows_a_step=run.rank_examples,
        steps=run.steps // rows.every_steps,
        per_step=rows.per_step,
        ranks=run.ranks,
        flush_steps=saved,
    )


def _memory(
    sketch: ModelSketch, work: Work, batch: BatchShape, run: TrainingRun, per_step: bool
) -> Memory:
    """What is held, and the most at other times."""
    rows = batch.examples * sketch.out_size * _SUMS_BYTES
    working = 3 * rows + work.summed_bytes
    if per_step:
        working = max(working, step_bytes(sketch, batch.element_bytes, run.parts))
    each = sketch.in_size * batch.element_bytes
    exact = min(_MEASURED_EXAMPLES, 1 + max(1, _MEASURED_BYTES // each))
    held = work.held_bytes + work.converted_bytes
    return Memory(
        held_bytes=held,
        working_bytes=working + work.converted_bytes,
        host_bytes=BUFFER_BYTES,
        first_step_bytes=0 if run.sharded else exact * each,
    )


def _network(
    sketch: ModelSketch, run: TrainingRun, per_step: bool, element: int
) -> Network:
    """Sketches of witnesses; in shards, the parts' sketches instead."""
    if run.ranks == 1:
        return Network(0, 0)
    numbers = sketch.out_size if run.sharded else min(_EXCHANGED, sketch.in_size)
    return Network(numbers * _SUMS_BYTES * per_step, sketch.in_size * element)


def _spectrum(
    sketch: ModelSketch,
    spectrum: SpectrumSettings,
    run: TrainingRun,
    gradient_seconds: float,
    element: int,
) -> SpectrumCost:
    """By autograd; ranks share the batches."""
    batches = -(-spectrum.batches // run.ranks)
    return SpectrumCost(
        spectrum.krylov_dim + _CHECKS + (element >= _SUMS_BYTES),
        _PRODUCT_GRADIENTS * batches * gradient_seconds,
        _PRODUCT_VECTORS * sketch.in_size * element,
        spectrum.krylov_dim * spectrum.out_size * _SUMS_BYTES,
    )
