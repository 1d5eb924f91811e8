"""Moving parameters by small steps, there and exactly back."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_sketch.sketch_sum import SketchSum

# Of the parameters' norm. On tiny GPT-2, Llama, BERT, T5, BART, ViT and on MiniLM in
# float32, truncation outweighs rounding from 1e-4 on along the gradient, the sharpest
# direction, while rounding stays below 2e-5 of the largest eigenvalue.
RELATIVE_STEP = 3e-5


class Displacement:
    """The parameters of a model, moved from theta by a step along a direction.

    Args:
        parameters: of the model, by name.
        norm: of the direction, at least roughly.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], norm: float) -> None:
        self._parameters = parameters
        norms = [torch.linalg.vector_norm(p.detach()) for p in parameters.values()]
        theta = float(torch.stack(norms).to(torch.float64).norm())
        self.step = RELATIVE_STEP * (theta or 1.0) / (norm or 1.0)
        self._saved: dict[str, Tensor] = {}

    @contextmanager
    def forward(self, direction: Iterable[tuple[str, Tensor]]) -> Generator[None]:
        """Move along the direction, which is read one parameter after the other.

        Leaving it puts the parameters back, bit for bit.
        """
        try:
            with torch.no_grad():
                for name, part in direction:
                    parameter = self._parameters[name]
                    self._saved[name] = parameter.detach().clone()
                    parameter.add_(part.to(parameter.dtype), alpha=self.step)
            yield
        finally:
            with torch.no_grad():
                for name, saved in self._saved.items():
                    self._parameters[name].copy_(saved)
            self._saved = {}

    def reverse(self) -> None:
        """From theta + d to theta - d, with the very d that rounding left."""
        with torch.no_grad():
            for name, saved in self._saved.items():
                self._parameters[name].sub_(saved).neg_().add_(saved)


@contextmanager
def gradients_into(
    total: SketchSum, parameters: Mapping[str, nn.Parameter]
) -> Generator[None]:
    """Sketch each parameter's gradient as a backward pass gives it, and drop it.

    Gradients and hooks that the parameters had are theirs again afterwards.
    """
    # Hooks of others may step an optimizer. They have no public name.
    plain: dict[str, Any] = dict(parameters)
    kept = {name: (p.grad, p._post_accumulate_grad_hooks) for name, p in plain.items()}
    handles: list[Any] = []

    def take(name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        total.add(name, gradient.reshape(1, -1))

    try:
        for name, parameter in plain.items():
            parameter.grad = parameter._post_accumulate_grad_hooks = None
            hook = partial(take, name)
            handles.append(parameter.register_post_accumulate_grad_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in plain.items():
            parameter.grad, parameter._post_accumulate_grad_hooks = kept[name]
