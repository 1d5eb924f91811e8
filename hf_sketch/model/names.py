"""Parameter names as the model's author wrote them."""

from torch import nn

_WRAPPERS = ("module.", "_orig_mod.")
_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."  # of each layer, under FSDP


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, each once, without the prefixes of wrapping modules."""
    return {_plain_name(name): p for name, p in model.named_parameters()}


def _plain_name(name: str) -> str:
    """A parameter's name without what DDP, FSDP and torch.compile add to it."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name.replace(_CHECKPOINT_WRAPPER, "")
