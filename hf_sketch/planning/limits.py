"""Where a planned run breaks."""

from collections.abc import Iterator
from typing import Final

from hf_sketch.planning.plan import Plan
from hf_sketch.planning.settings import TrainingRun

_MAPPED_FILES: Final = 65530  # files that Linux maps per process by default
_STATE_BYTES: Final = 8  # AdamW's per element


def limits_of(
    plan: Plan, run: TrainingRun, memory_bytes: float, element_bytes: int
) -> list[str]:
    """Return what does not work, or not well, one sentence each with a way out.

    Args:
        plan: plan of the run.
        run: planned run.
        memory_bytes: memory of each device.
        element_bytes: bytes per number of a parameter.
    """
    return [
        *_of_the_model(plan, run, memory_bytes, element_bytes),
        *_of_the_store(plan),
    ]


def _of_the_model(
    plan: Plan, run: TrainingRun, memory_bytes: float, element_bytes: int
) -> Iterator[str]:
    """Parameters, gradients and the optimizer's state on each rank."""
    needed = plan.elements * (2 * element_bytes + _STATE_BYTES) / run.parts
    if run.sharded:
        yield (
            "sharded models are recorded under FSDP2 (fsdp_version 2) or ZeRO-3, and "
            "HessianSpectrumCallback refuses them"
        )
    if needed > memory_bytes:
        yield (
            f"training itself needs {needed:.3g} bytes per device for parameters, "
            f"gradients and AdamW, and the device has {memory_bytes:.3g}: freeze "
            "parameters, or use larger devices"
        )
    elif needed + plan.first_step_bytes > memory_bytes:
        yield (
            "the exact gradients of the first step need "
            f"{plan.first_step_bytes:.3g} bytes, and {memory_bytes - needed:.3g} are "
            "free beside the model's state: rows will not be compared with them"
        )
    if element_bytes < 4:
        yield (
            "finite differences need float32 parameters: Hessian-vector products use "
            "autograd, with the activations of a double backward pass"
        )
    if plan.uncounted:
        yield (
            f"the estimates leave out {len(plan.uncounted)} modules: "
            f"{', '.join(plan.uncounted[:3])}"
        )


def _of_the_store(plan: Plan) -> Iterator[str]:
    """Many files."""
    store = plan.store
    if store.files > _MAPPED_FILES:
        yield (
            f"the store has {store.files:,} files, and Linux maps {_MAPPED_FILES:,} per"
            " process: raise vm.max_map_count to open it as one, or join its files "
            "with hf-sketch compact"
        )
