"""Running a model without leaving a trace."""

import importlib
import random
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RandomState:
    """States of the generators that a module draws from.

    Args:
        of_torch: random states of torch's CPU generator and of the module's device.
        of_others: NumPy's and Python's; None if nothing draws from them.
    """

    of_torch: tuple[Tensor, ...]
    of_others: tuple[Any, Any] | None = None

    def same(self, other: "RandomState") -> bool:
        """Return whether no random number was drawn between the two."""
        pairs = zip(self.of_torch, other.of_torch, strict=True)
        return self._key == other._key and all(  # torch_xla's is a plain number
            torch.equal(*map(torch.as_tensor, pair)) for pair in pairs
        )

    @property
    def _key(self) -> object:
        if self.of_others is None:
            return None
        (kind, words, *rest), python = self.of_others
        return kind, words.tobytes(), rest, python


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Eval mode; every module's own mode and the random numbers are restored."""
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    model.eval()
    try:
        with kept_random_state(random_state(device, everywhere=True), device):
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


def random_state(device: torch.device, everywhere: bool = False) -> RandomState:
    """Return the states of the generators that a module on this device draws from.

    Args:
        device: the module's.
        everywhere: include the states of NumPy and Python, which takes about 0.1 ms.
    """
    others = (np.random.get_state(), random.getstate()) if everywhere else None
    of_torch = (torch.get_rng_state(),)
    if device.type != "cpu":
        of_torch = *of_torch, _accelerator(device).get_rng_state(device)
    return RandomState(of_torch, others)


def draws_elsewhere(module: nn.Module) -> bool:
    """Return whether a module may draw from NumPy's or Python's generators.

    So do SpecAugment, and layers that are dropped at random: their files import these.
    """
    files = {type(part).__module__ for part in module.modules()}
    return any(
        value is np or value is random
        for file in files
        if file in sys.modules and not file.startswith("torch.")
        for value in vars(sys.modules[file]).values()
    )


@contextmanager
def kept_random_state(state: RandomState, device: torch.device) -> Generator[None]:
    """Draw from these states, and leave the generators as they were."""
    before = random_state(device, everywhere=state.of_others is not None)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(before, device)


def _set_random_state(state: RandomState, device: torch.device) -> None:
    torch.set_rng_state(state.of_torch[0])
    for accelerator in state.of_torch[1:]:
        _accelerator(device).set_rng_state(accelerator, device)
    if state.of_others is not None:
        numpy, python = state.of_others
        np.random.set_state(numpy)
        random.setstate(python)


def _accelerator(device: torch.device) -> Any:
    """The module that keeps the device's random state: torch_xla's is not in torch."""
    if device.type == "xla":
        return importlib.import_module("torch_xla.core.xla_model")
    return torch.get_device_module(device)
