"""Running a model without leaving a trace."""

import importlib
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Eval mode; every module's own mode and the random numbers are restored."""
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    model.eval()
    try:
        with kept_random_state(random_state(device), device):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def without_zeros(parameters: Iterable[Tensor]) -> Generator[None]:
    """Give parameters that are all zero small numbers, and their zeros back.

    What they are multiplied by, as LoRA's first factor, has no gradient otherwise.
    """
    zeros = [p.data for p in parameters if p.numel() and not p.any()]
    before = [zero.clone() for zero in zeros]  # with their signs
    try:
        for zero in zeros:
            count = torch.arange(zero.numel(), device=zero.device)
            zero.copy_(0.1 * (1.7 * count).cos().view(zero.shape))
        yield
    finally:
        for zero, kept in zip(zeros, before, strict=True):
            zero.copy_(kept)


@contextmanager
def own_forward(model: nn.Module, forward: Any) -> Generator[None]:
    """Within, the model's forward pass is `forward`, or its class's if that is None.

    Losses may put another in its place that keeps what it returns, as
    sentence-transformers' MatryoshkaLoss does.
    """
    attributes = vars(model)
    before = attributes.pop("forward", None)
    if forward is not None:
        attributes["forward"] = forward
    try:
        yield
    finally:
        attributes.pop("forward", None)
        if before is not None:
            attributes["forward"] = before


def random_state(device: torch.device) -> tuple[Tensor, ...]:
    """The states of the generators that a module on this device draws from."""
    if device.type == "cpu":
        return (torch.get_rng_state(),)
    return torch.get_rng_state(), _accelerator(device).get_rng_state(device)


def same_state(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    """Return whether no random number was drawn between these states."""
    pairs = zip(left, right, strict=True)  # torch_xla's is a plain number
    return all(torch.equal(*map(torch.as_tensor, pair)) for pair in pairs)


@contextmanager
def kept_random_state(
    state: tuple[Tensor, ...], device: torch.device
) -> Generator[None]:
    """Draw from these states, and leave the generators as they were."""
    before = random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(before, device)


def _set_random_state(state: tuple[Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    for accelerator in state[1:]:
        _accelerator(device).set_rng_state(accelerator, device)


def _accelerator(device: torch.device) -> Any:
    """The module that keeps the device's random state: torch_xla's is not in torch."""
    if device.type == "xla":
        return importlib.import_module("torch_xla.core.xla_model")
    return torch.get_device_module(device)
