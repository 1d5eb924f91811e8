"""Whether a model's gradient can be differentiated again, and the setting for it."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_sketch.curvature.mean_loss import is_out_of_memory
from hf_sketch.model.state import evaluation_mode

MODES = ("auto", "autograd", "finite_difference")
_REPLACEABLE = ("eager", "sdpa")


class DoubleBackwardError(ValueError):
    """The gradient of a model cannot be differentiated."""


def obstacle_to_double_backward(model: nn.Module) -> str | None:
    """Why autograd cannot differentiate the model's gradient, if that can be seen."""
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
        return "the weights are quantised, and their kernels have no double backward"
    return None


def obstacle_to_finite_differences(model: nn.Module) -> str | None:
    """Why the parameters cannot be moved by small steps, if they cannot."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.element_size() < 4:
            return f"{name} is {parameter.dtype}, too coarse for small steps"
    return None


def choose_mode(model: nn.Module, mode: str) -> tuple[str, str | None]:
    """The mode that is used, and why it is not autograd if it is not.

    Raises:
        ValueError: the mode is unknown, or the model does not allow it.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}.")
    double = obstacle_to_double_backward(model)
    if mode == "autograd" or (mode == "auto" and double is None):
        if double is not None:
            raise DoubleBackwardError(
                f'mode="autograd" needs a double backward, but {double}: pass '
                'mode="finite_difference", or the model without it.'
            )
        return "autograd", None
    coarse = obstacle_to_finite_differences(model)
    if coarse is not None:
        other = ', or pass mode="autograd"' if double is None else f", as {double}"
        raise ValueError(
            f"finite differences need float32 parameters, but {coarse}: load the model "
            f"with dtype=torch.float32{other}."
        )
    return "finite_difference", double


@contextmanager
def curvature_setting(model: nn.Module, mode: str) -> Generator[None]:
    """Eval mode, no autocast, and for autograd attention that differentiates twice.

    Everything that is touched, also the random state, is as before afterwards, even
    after an error.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(_own_forward(model))
        device = next(model.parameters()).device
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if mode == "autograd":
            stack.enter_context(_plain_attention(model))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@contextmanager
def _own_forward(model: nn.Module) -> Generator[None]:
    """The forward that the model had before Accelerate wrapped autocast around it."""
    patched: Any = vars(model).get("forward")
    original = vars(model).get("_original_forward")
    if original is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = patched


@contextmanager
def _plain_attention(model: nn.Module) -> Generator[None]:
    """Eager attention instead of kernels outside torch's own sdpa."""
    before = _attention_of(getattr(model, "config", None))
    if all(kernel in _REPLACEABLE for kernel in before.values()):
        yield
        return
    switch: Any = model.set_attn_implementation
    switch("eager")
    try:
        yield
    finally:
        switch(before)


def _attention_of(config: Any) -> dict[str, str]:
    """The attention kernel of a model, under "", and of its parts by their names."""
    parts = {"": config}
    for name in getattr(config, "sub_configs", ()):
        parts[name] = getattr(config, name)
    found = {n: getattr(c, "_attn_implementation", None) for n, c in parts.items()}
    return {name: kernel for name, kernel in found.items() if kernel is not None}


def check_graph(gradient: Sequence[Tensor]) -> None:
    """Raise if an operation that made a gradient is marked once_differentiable.

    The mark lies on no path to the parameters, so that autograd.grad misses it, and
    takes what the operation gave for a constant.
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


@contextmanager
def explained() -> Generator[None]:
    """Tell what to do where a kernel has no double backward.

    Raises:
        DoubleBackwardError: anything but lack of memory went wrong.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise DoubleBackwardError(
            "an operation of the model has no double backward "
            f'({str(error).splitlines()[0]}): pass mode="finite_difference".'
        ) from error
