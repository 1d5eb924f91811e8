"""Where a planned run breaks."""

from collections.abc import Iterator
from typing import Final

from hf_sketch.planning.machine import Machine
from hf_sketch.planning.plan import Plan
from hf_sketch.planning.settings import TrainingRun

_MAPPED_FILES: Final = 65530  # that Linux maps for a process by default
_STATE_BYTES: Final = 8  # of AdamW for an element


def limits_of(
    plan: Plan, run: TrainingRun, machine: Machine, element_bytes: int
) -> list[str]:
    """What does not work, or not well, each in one sentence with a way out.

    Args:
        plan: of the run.
        run: that is planned.
        machine: of each rank.
        element_bytes: of a parameter.
    """
    return [
        *_of_the_model(plan, run, machine, element_bytes),
        *_of_the_store(plan),
    ]


def _of_the_model(
    plan: Plan, run: TrainingRun, machine: Machine, element_bytes: int
) -> Iterator[str]:
    """Parameters, gradients and the optimizer's state on each rank."""
    needed = plan.elements * (2 * element_bytes + _STATE_BYTES) / run.parts
    free = machine.memory_bytes - needed
    if run.sharded:
        yield (
            "in shards there are rows of FSDP2 alone (fsdp_version 2), and no spectra: "
            "HessianSpectrumCallback refuses them"
        )
    if free < 0:
        yield (
            f"training itself needs {needed:.3g} bytes on each device for parameters, "
            f"gradients and AdamW, and the device has {machine.memory_bytes:.3g}: "
            "freeze parameters, or take larger devices"
        )
    elif plan.memory.first_step_bytes > free:
        yield (
            "the exact gradients of the first step need "
            f"{plan.memory.first_step_bytes:.3g} bytes, and {free:.3g} are free beside "
            "the model's state"
        )
    if element_bytes < 4:
        yield (
            "finite differences need float32 parameters: Hessian-vector products are "
            "taken by autograd, with the activations of a double backward pass"
        )
    if plan.uncounted:
        yield (
            f"the work of {len(plan.uncounted)} modules is not in the estimates: "
            f"{', '.join(plan.uncounted[:3])}"
        )


def _of_the_store(plan: Plan) -> Iterator[str]:
    """Many files."""
    store = plan.store
    if store.files > _MAPPED_FILES:
        yield (
            f"the store has {store.files:,} files, and Linux maps {_MAPPED_FILES:,} "
            "for a process: raise vm.max_map_count to open it as one"
        )
    rewritten = store.files_a_rank * store.manifest_bytes / 2
    if rewritten > store.total_bytes / store.files * store.files_a_rank:
        yield (
            "a rank's manifest is written anew with each of its "
            f"{store.files_a_rank:,} files, {rewritten:.3g} bytes in all, more than "
            "its rows: record on more ranks, or fewer steps"
        )
