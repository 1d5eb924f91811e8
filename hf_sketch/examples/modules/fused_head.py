"""The rule of output embeddings that a fused loss uses without calling them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_sketch.examples.batch import Batch
from hf_sketch.examples.calls import IGNORED, loss_of, next_labels
from hf_sketch.sketches.operator import accumulation_dtype

_HIDDEN = "last_hidden_state"
_KINDS: tuple[Literal["log_probs", "entropy"], ...] = ("log_probs", "entropy")
_ELEMENTS_AT_ONCE = 2**24  # logits
_FITTED_TOKENS = 64
_NEWTON_STEPS = 12


@dataclass(frozen=True)
class _Scores:
    """What makes scores of logits: softcap * tanh(scale * logits / softcap) / T.

    Args:
        scale: a factor of the logits.
        softcap: bound of the scores before the temperature divides them; None for none.
        temperature: T.
    """

    scale: float
    softcap: float | None
    temperature: float = 1.0

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
        scale = self.scale / self.temperature
        if self.softcap is None:
            return logits if scale == 1 else scale * logits, scale
        bounded = torch.tanh(logits * (self.scale / self.softcap))
        slope = (1 - bounded.square()).mul_(scale)
        return bounded.mul_(self.softcap / self.temperature), slope

    def fitted(self, logits: Tensor, labels: Tensor, log_probs: Tensor) -> "_Scores":
        """Return the same with the temperature that the log-probabilities tell.

        Fit by Gauss-Newton, and left at 1 where rounding explains the difference.

        Shapes:
            logits (t, vocabulary), labels (t,), log_probs (t,)
        """
        scores, _ = self(logits.double())
        inverse, deviation = 1.0, 0.0
        for _ in range(_NEWTON_STEPS):
            got = (inverse * scores).log_softmax(-1)
            error = got.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - log_probs
            own = scores.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            slope = own - (got.exp_() * scores).sum(-1)
            inverse -= float(slope @ error / (slope @ slope))
            deviation = float(error.norm() / slope.norm() / len(error) ** 0.5)
        is_one = not abs(inverse - 1) > 3 * deviation + 1e-5
        return self if is_one else replace(self, temperature=1 / inverse)


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
        self._scores, self._is_fitted = _Scores.of(self._owner), False
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
        if current() is not None and torch.is_grad_enabled():
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
        if batch is None or hidden is None or not torch.is_grad_enabled():
            return  # as of a reference model, which may be this one without adapters
        labels = next_labels(batch.inputs)
        assert labels is not None
        if batch.inputs.get("shift_labels") is None:
            hidden = hidden[:, -labels.shape[1] - 1 : -1]
        loss, log_probs = loss_of(output), output.get("log_probs")
        if isinstance(log_probs, Tensor) and log_probs.requires_grad:
            self._fit(hidden, labels, log_probs.detach())
            for kind in _KINDS:
                if isinstance(x := output.get(kind), Tensor) and x.requires_grad:
                    batch.watch(x, partial(self._add, batch, hidden, labels, kind))
        elif loss is not None:
            read = partial(self._add_evenly, batch, hidden, labels)
            batch.watch(loss, read)

    def _add_evenly(
        self, batch: Batch, hidden: Tensor, labels: Tensor, gradient: Tensor
    ) -> None:
        """Add the head's gradients, given that of a mean of log-probabilities."""
        items = batch.inputs.get("num_items_in_batch")
        counted = (labels != IGNORED).sum() if items is None else items
        even = (-gradient / counted).expand(labels.shape)
        self._add(batch, hidden, labels, "log_probs", even)

    def _add(
        self,
        batch: Batch,
        hidden: Tensor,
        labels: Tensor,
        kind: Literal["log_probs", "entropy"],
        coefficients: Tensor,
    ) -> None:
        """Add the head's gradients, given those of a quantity per token."""
        labels, hidden = _laid_out(batch, labels), _laid_out(batch, hidden)
        dtype = accumulation_dtype(hidden.dtype)
        coefficients = _laid_out(batch, coefficients).to(dtype)
        coefficients = coefficients.where(labels != IGNORED, 0)
        labels = labels.clamp(min=0)
        each = max(1, _ELEMENTS_AT_ONCE // (len(labels) * len(self.head.weight)))
        for start in range(0, labels.shape[1], each):
            places = slice(start, start + each)
            scores, slope = self._scores(self._logits(hidden[:, places]).to(dtype))
            # The factors per token join the hidden states, which are narrower.
            left = _entropy_part(scores) if kind == "entropy" else scores.softmax(-1)
            factors, chosen = coefficients[:, places], labels[:, places]
            if isinstance(slope, Tensor):
                left = left.mul_(slope)
                at_label = slope.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
            else:
                factors, at_label = slope * factors, 1.0
            self._add_product(batch, left, hidden[:, places], -factors)
            if kind == "log_probs":
                own = factors * at_label
                self._add_product(batch, chosen, hidden[:, places], own)

    def _add_product(
        self, batch: Batch, left: Tensor, hidden: Tensor, factors: Tensor
    ) -> None:
        """Add the sum over tokens of factor * left (x) hidden to the weight's rows.

        Integer `left` stands for one-hot vectors.
        """
        sums, name = batch.sums, self.names.get("weight")
        if name is not None:
            right = hidden.to(factors) * factors.unsqueeze(-1)
            sums.add_outer(name, left, right)
        if (name := self.names.get("bias")) is None:
            return
        if left.is_floating_point():
            rows = torch.bmm(factors.unsqueeze(1), left).squeeze(1)
        else:
            rows = factors.new_zeros(len(left), len(self.head.weight))
            rows.scatter_add_(1, left, factors)
        sums.add(name, rows)

    def _logits(self, hidden: Tensor) -> Tensor:
        weight, bias = self.head.weight.detach(), self.head.bias
        bias = None if bias is None else bias.detach()
        return nn.functional.linear(hidden.to(weight), weight, bias)

    def _fit(self, hidden: Tensor, labels: Tensor, log_probs: Tensor) -> None:
        """Find the temperature by the log-probabilities of some tokens, once."""
        if self._is_fitted or log_probs.shape != labels.shape:
            return
        places = (labels != IGNORED).nonzero(as_tuple=True)
        some = tuple(place[:_FITTED_TOKENS] for place in places)
        if not len(some[0]):
            return
        logits = self._logits(hidden[some])
        self._scores = self._scores.fitted(logits, labels[some], log_probs[some])
        self._is_fitted = True


def _entropy_part(scores: Tensor) -> Tensor:
    """Return minus the derivative of each token's entropy by its scores."""
    log_probs = scores.log_softmax(-1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs).sum(-1, keepdim=True)
    return probs.mul_(log_probs.add_(entropy))


def _laid_out(batch: Batch, x: Tensor) -> Tensor:
    """Return one row per example, with zeros where it has fewer tokens."""
    rows = batch.split.rows(x)
    assert rows is not None
    return rows


def _head_of(model: nn.Module) -> tuple[Any, Any]:
    """Return the part of the model that has a head, and the head."""
    for module in model.modules():
        # PEFT's wrappers pass the method on, but have no body of their own.
        if callable(getattr(type(module), "get_output_embeddings", None)):
            owner: Any = module
            if (head := owner.get_output_embeddings()) is not None:
                return owner, head
    return None, None
