"""Whether a model's gradient can be differentiated again, and the setting for it."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_sketch.model.state import evaluation_mode
from hf_sketch.sketches.choices import check_choice

Mode = Literal["auto", "autograd", "finite_difference"]

_REPLACEABLE: Final = ("eager", "sdpa")
# What torch 2.13 says of an operation whose gradient it cannot differentiate.
_NO_DOUBLE_BACKWARD: Final = (
    "is not implemented",  # derivative for aten::... is not implemented
    "once_differentiable",
    "double backward",  # of compiled graphs
    "modified by an inplace operation",  # a backward pass that overwrites what it saved
    "not have been used in the graph",
)


class DoubleBackwardError(ValueError):
    """An operation of the model has a gradient that cannot be differentiated."""


def obstacle_to_double_backward(model: nn.Module) -> str | None:
    """Return why autograd cannot differentiate the model's gradient, if it shows."""
    for path, module in model.named_modules():
        marks = ("_orig_mod", "_compiled_call_impl")
        if any(getattr(module, mark, None) is not None for mark in marks):
            return (
                f"{path or 'the model'} is compiled, and compiled graphs have no double"
                " backward"
            )
        forward = vars(module).get("_original_forward", module.forward)
        sources = {type(module).__module__, getattr(forward, "__module__", "")}
        if any(source.startswith("liger_kernel") for source in sources):
            return (
                f"{path or 'the model'} ({type(module).__name__}) runs a Liger kernel, "
                "which computes gradients in the forward pass"
            )
    if getattr(model, "is_quantized", False):
        return "the weights are quantized, and their kernels have no double backward"
    return None


def obstacle_to_finite_differences(model: nn.Module) -> str | None:
    """Return why the parameters cannot be moved by small steps, if they cannot."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.element_size() < 4:
            return f"{name} is {parameter.dtype}, too coarse for small steps"
    return None


def choose_mode(model: nn.Module, mode: Mode) -> tuple[str, str | None]:
    """Return the mode that is used, and why it is not autograd if it is not.

    Raises:
        ValueError: the mode is unknown, or the model does not allow it.
    """
    check_choice("mode", mode, get_args(Mode))
    double = obstacle_to_double_backward(model)
    if mode == "autograd" and double is not None:
        raise DoubleBackwardError(
            f'mode="autograd" needs a double backward, but {double}. Pass '
            'mode="finite_difference".'
        )
    if mode != "finite_difference" and double is None:
        return "autograd", None
    coarse = obstacle_to_finite_differences(model)
    if coarse is not None:
        other = ', or pass mode="autograd"' if double is None else f", as {double}"
        raise ValueError(
            f"Finite differences need float32 parameters, but {coarse}. Load the model "
            f"with dtype=torch.float32{other}."
        )
    return "finite_difference", double


@contextmanager
def curvature_setting(model: nn.Module, mode: str) -> Generator[None]:
    """Eval mode, no autocast, and for autograd attention that differentiates twice.

    Afterwards everything is restored, even after an error, the random state included.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        own: dict[str, Any] = vars(model)
        if "_original_forward" in own:  # Accelerate (1.15) wrapped autocast around it
            stack.callback(setattr, model, "forward", own["forward"])
            model.forward = own["_original_forward"]
        device = next(model.parameters()).device
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if mode == "autograd":
            kernels = _attention_of(getattr(model, "config", None))
            if any(kernel not in _REPLACEABLE for kernel in kernels.values()):
                switch: Any = model.set_attn_implementation
                stack.callback(switch, kernels)
                switch("eager")
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.enable_grad())
        yield


def _attention_of(config: Any) -> dict[str, str]:
    """Return the attention kernel of a model, under "", and of its parts by name."""
    parts = {"": config}
    for name in getattr(config, "sub_configs", ()):
        parts[name] = getattr(config, name)
    found = {n: getattr(c, "_attn_implementation", None) for n, c in parts.items()}
    return {name: kernel for name, kernel in found.items() if kernel is not None}


@contextmanager
def differentiated_again(gradient: Sequence[Tensor]) -> Generator[None]:
    """Differentiate a gradient inside; name the way out if a kernel cannot.

    Raises:
        DoubleBackwardError: torch says so; any other error passes through.
    """
    try:
        _check_graph(gradient)
        yield
    except RuntimeError as error:
        if not any(text in str(error) for text in _NO_DOUBLE_BACKWARD):
            raise
        raise DoubleBackwardError(
            "An operation of the model has no double backward "
            f'({str(error).splitlines()[0]}). Pass mode="finite_difference".'
        ) from error


def _check_graph(gradient: Sequence[Tensor]) -> None:
    """Raise if an operation that made a gradient is marked once_differentiable.

    The mark lies on no path to the parameters: autograd.grad misses it, and takes the
    operation's result for a constant.
    """
    nodes = [part.grad_fn for part in gradient]
    seen: set[Any] = {None}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("it is marked once_differentiable")
        nodes += [before for before, _ in node.next_functions]
