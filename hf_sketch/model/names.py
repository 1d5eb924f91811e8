"""Parameter names as the model's author wrote them."""

from collections.abc import Mapping
from typing import Final

from torch import nn

from hf_sketch.model.zero import whole_shape

# PeftModel.from_pretrained freezes the adapter unless it is passed is_trainable=True.
WHAT_TRAINS: Final = (
    "call requires_grad_(True) on the parameters that train, and load an adapter with "
    "PeftModel.from_pretrained(..., is_trainable=True)."
)
_WRAPPERS = ("module.", "_orig_mod.")
_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."  # of each layer, under FSDP


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, each once, without the prefixes of wrapping modules."""
    return {_plain_name(name): p for name, p in model.named_parameters()}


def trainable_parameters(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, nn.Parameter]:
    """Parameters that train, by name.

    Raises:
        ValueError: they are others than those of a sketch, or of other shapes.
    """
    trainable = {n: p for n, p in named_parameters(model).items() if p.requires_grad}
    if not trainable:
        raise ValueError(f"The model has no trainable parameter: {WHAT_TRAINS}")
    theirs = {name: whole_shape(p) for name, p in trainable.items()}
    for name in [*shapes, *theirs]:
        if shapes.get(name) != theirs.get(name):
            raise ValueError(
                f"the sketch has {name!r} with shape {shapes.get(name)}, the model has "
                f"{theirs.get(name)} there: pass the model that the sketch was made "
                "for, with the same parameters trainable."
            )
    return trainable


def _plain_name(name: str) -> str:
    """A parameter's name without what DDP, FSDP and torch.compile add to it."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name.replace(_CHECKPOINT_WRAPPER, "")
