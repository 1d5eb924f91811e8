"""The rule of embeddings."""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

from hf_sketch.examples.rounding import agree
from hf_sketch.examples.rules.base import Call, Contribution, Rule, tokens
from hf_sketch.examples.split import ExampleSplit

Saved = tuple[ExampleSplit, Tensor, Tensor | None]  # ids, and which are padding


class Embedding(Rule):
    """y = scale * W[ids]; the padding row gets no gradient.

    A module with a forward pass of its own may only scale; its first call shows by how
    much.

    Raises:
        ValueError: an example's gradient depends on the rest of its batch.
    """

    def __init__(self, module: nn.Embedding, path: str, names: dict[str, str]) -> None:
        super().__init__(module, path, names)
        _check_independence(module)
        self.forget()
        self._padding = module.padding_idx

    def forget(self) -> None:
        plain = type(self.module).forward is nn.Embedding.forward
        self.scale = 1.0 if plain else None
        self.applies = True

    def forward(self, call: Call) -> Saved | None:
        if not call.has_input:
            return None
        ids = call.input
        if ids.is_floating_point() or ids.shape != call.output.shape[:-1]:
            return None
        if self.scale is None and self.applies:
            self.scale = _scale_of(call, self.module.get_parameter("weight"))
            self.applies = self.scale is not None
        ids = call.split.rows(ids)
        if ids is None or self.scale is None:
            return None
        ids, padding = ids.flatten(1), None
        if self._padding is not None:
            padding = (ids == self._padding).unsqueeze(-1)
        return call.split, ids, padding

    def backward(self, saved: Saved, gradient: Tensor) -> Iterator[Contribution]:
        split, ids, padding = saved
        assert self.scale is not None
        # Gemma 3n's gradients there are not finite; training leaves them out, too.
        right = tokens(split, gradient)
        right = right if self.scale == 1 else self.scale * right
        right = right if padding is None else right.masked_fill(padding, 0)
        yield "weight", ids, right


def _scale_of(call: Call, weight: Tensor) -> float | None:
    """Return the factor between the output and the looked up rows, if there is one."""
    if int(call.input.max()) >= len(weight):  # ids of something else
        return None
    plain = functional.embedding(call.input, weight).to(call.output.dtype)
    if plain.shape != call.output.shape:
        return None
    energy = plain.square().sum()
    scale = float((call.output * plain).sum() / energy) if energy > 0 else 0.0
    return scale if agree(call.output, scale * plain, "rule") else None


def _check_independence(module: nn.Embedding) -> None:
    """Raise if an example's gradient depends on the rest of its batch."""
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise ValueError(
            "Per-example gradients need an Embedding without max_norm, "
            f"scale_grad_by_freq and sparse, got max_norm={module.max_norm}, "
            f"scale_grad_by_freq={module.scale_grad_by_freq}, sparse={module.sparse}. "
            "Turn them off, or pass per_example=False."
        )
