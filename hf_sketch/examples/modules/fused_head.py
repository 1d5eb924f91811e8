"""The rule of output embeddings that a fused loss uses without calling them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_sketch.examples.batch import Batch
from hf_sketch.examples.calls import loss_of
from hf_sketch.sketches.operator import accumulation_dtype

_HIDDEN = "last_hidden_state"
_IGNORED = -100
_ELEMENTS_AT_ONCE = 2**24  # logits


@dataclass(frozen=True)
class _Scores:
    """What makes scores of logits: softcap * tanh(scale * logits / softcap).

    Args:
        scale: a factor of the logits.
        softcap: bound of the scores; None for none.
    """

    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any) -> "_Scores":
        config: Any = getattr(model, "config", None)
        config = None if config is None else config.get_text_config()
        scale = 1.0
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
            value = getattr(config, name, None)
            scale = value if isinstance(value, float) else scale
        divisor = getattr(config, "logits_scaling", None)
        scale = 1 / divisor if isinstance(divisor, (int, float)) else scale
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return scores and their derivatives."""
        logits = self.scale * logits
        if self.softcap is None:
            return logits, self.scale
        bounded = torch.tanh(logits / self.softcap)
        return self.softcap * bounded, self.scale * (1 - bounded.square())


class FusedHead:
    """Reads the gradients of a head whose logits a fused loss never keeps.

    Such losses (TRL's, Liger's, cut cross-entropy) call the model's body and take the
    head's weight by themselves. The gradient of a token's log-probability is its
    coefficient times (one-hot minus softmax), outer its hidden state. The coefficient
    is the gradient of the model's `log_probs`; where the model returns its loss alone,
    each token has the same. Scores are computed again, a few tokens at a time.

    Args:
        model: the model.
        parameters: its trainable parameters, by name.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._owner, self.head = _head_of(model)
        self._model = model
        self.names = {
            attribute: names[id(value)]
            for attribute in ("weight", "bias")
            if id(value := getattr(self.head, attribute, None)) in names
        }
        self._scores = _Scores.of(self._owner)
        self._hidden: Tensor | None = None

    def covers(self, module: nn.Module) -> bool:
        """Return whether this is the head, or a part of it that trains."""
        head = self.head
        return head is not None and any(module is part for part in head.modules())

    def clear(self) -> None:
        """Let go of the last batch's tensors."""
        self._hidden = None

    def register(
        self, current: Callable[[], Batch | None]
    ) -> list[Callable[[], object]]:
        """Put the hooks on and return what takes them off."""
        body: Any = getattr(self._owner, self._owner.base_model_prefix)
        keep = body.register_forward_hook(partial(self._keep, current))
        watch = self._model.register_forward_hook(
            partial(self._watch, current), with_kwargs=True
        )
        return [keep.remove, watch.remove]

    def _keep(
        self, current: Callable[[], Batch | None], module: Any, args: Any, output: Any
    ) -> None:
        """Keep the last hidden states."""
        if current() is not None:
            hidden = output[0] if isinstance(output, tuple) else output[_HIDDEN]
            self._hidden = hidden.detach()

    def _watch(
        self,
        current: Callable[[], Batch | None],
        module: Any,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> None:
        """Read the coefficients, when they are there."""
        batch, hidden = current(), self._hidden
        if batch is None or hidden is None:
            return
        labels = batch.inputs.get("shift_labels")
        if labels is None:
            labels = batch.inputs["labels"][:, 1:]
            hidden = hidden[:, -labels.shape[1] - 1 : -1]
        log_probs, loss = output.get("log_probs"), loss_of(output)
        if isinstance(log_probs, Tensor) and log_probs.requires_grad:
            batch.watch(log_probs, partial(self._add, batch, hidden, labels))
        elif loss is not None:
            items = batch.inputs.get("num_items_in_batch")
            counted = (labels != _IGNORED).sum() if items is None else items

            def add(gradient: Tensor) -> None:
                even = (-gradient / counted).expand(labels.shape)
                self._add(batch, hidden, labels, even)

            batch.watch(loss, add)

    def _add(
        self, batch: Batch, hidden: Tensor, labels: Tensor, coefficients: Tensor
    ) -> None:
        """Add the head's gradients, given those of the tokens' log-probabilities."""
        labels, hidden = _laid_out(batch, labels), _laid_out(batch, hidden)
        coefficients = _laid_out(batch, coefficients)
        coefficients = coefficients.where(labels != _IGNORED, 0)
        weight_name, bias_name = self.names.get("weight"), self.names.get("bias")
        for places, left in self._scored(hidden, labels, coefficients):
            if weight_name is not None:
                right = batch.sums.fold(weight_name, hidden[:, places], 1)
                folded = batch.sums.fold(weight_name, left, 0)
                batch.sums.add_outer(weight_name, folded, right)
            if bias_name is not None:
                batch.sums.add(bias_name, left.sum(1))

    def _scored(
        self, hidden: Tensor, labels: Tensor, coefficients: Tensor
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the gradients of logits, (b, some tokens, vocabulary)."""
        head: Any = self.head
        weight, bias = head.weight.detach(), head.bias
        each = max(1, _ELEMENTS_AT_ONCE // (len(labels) * len(weight)))
        dtype = accumulation_dtype(hidden.dtype)
        for start in range(0, labels.shape[1], each):
            places = slice(start, start + each)
            logits = nn.functional.linear(hidden[:, places].to(weight), weight, bias)
            scores, slope = self._scores(logits.to(dtype))
            part = coefficients[:, places].unsqueeze(-1).to(dtype)
            left = scores.softmax(-1).mul_(-part)
            chosen = labels[:, places].clamp(min=0).unsqueeze(-1)
            left.scatter_add_(-1, chosen, part.expand(chosen.shape))
            yield places, left.mul_(slope)


def _laid_out(batch: Batch, x: Tensor) -> Tensor:
    """Return one row per example, with zeros where it has fewer tokens."""
    rows = batch.split.rows(x)
    assert rows is not None
    return rows


def _head_of(model: nn.Module) -> tuple[Any, Any]:
    """Return the part of the model that has a head, and the head."""
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        if callable(get) and (head := get()) is not None:
            return module, head
    return None, None
