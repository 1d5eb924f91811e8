"""The rule of output embeddings that a fused loss uses without calling them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_sketch.examples.batch import Batch
from hf_sketch.examples.calls import IGNORED, loss_of, next_labels
from hf_sketch.examples.comparison import first_met
from hf_sketch.model.zero import gathered
from hf_sketch.sketches.operator import accumulation_dtype
from hf_sketch.sketches.outer import Side
from hf_sketch.sketches.two_sided.turning import OneSide, turn_softmax

_HIDDEN = "last_hidden_state"
_KINDS: tuple[Literal["log_probs", "entropy"], ...] = ("log_probs", "entropy")
_LOGITS_AT_ONCE = 2**24
_LOGITS_OF_A_KERNEL = 2**26  # enough programs for a device
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
    each token has the same. Scores are computed again, a few tokens at a time, in the
    precision of the forward pass.

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
        self._autocast: torch.dtype | None = None
        # Whether the loss is not of the log-probabilities beside it: DeepSpeed puts a
        # function of its own before each output.
        self._is_apart: bool | None = None

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
            self._hidden, kind = hidden.detach(), hidden.device.type
            self._autocast = None
            if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
                self._autocast = torch.get_autocast_dtype(kind)

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
            with self._whole():  # by all processes, also where one has no labels
                self._fit(hidden, labels, log_probs.detach())
            for kind in _KINDS:
                if isinstance(x := output.get(kind), Tensor) and x.requires_grad:
                    batch.watch(x, partial(self._add, batch, hidden, labels, kind))
            if self._is_apart is None and loss is not None:
                self._is_apart = not first_met(loss, [log_probs])
            loss = loss if self._is_apart else None
        if loss is not None and loss.requires_grad:
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
        with self._whole():
            self._add_rows(batch, hidden, labels.clamp(min=0), kind, coefficients)

    def _add_rows(
        self,
        batch: Batch,
        hidden: Tensor,
        labels: Tensor,
        kind: Literal["log_probs", "entropy"],
        coefficients: Tensor,
    ) -> None:
        """As `_add`, for one row per example and a head that is whole."""
        score = self._head()
        side = self._side(batch, score(hidden[:0])) if kind == "log_probs" else None
        at_once = _LOGITS_AT_ONCE if side is None else _LOGITS_OF_A_KERNEL
        each = max(1, at_once // (len(labels) * len(self.head.weight)))
        for start in range(0, labels.shape[1], each):
            places = slice(start, start + each)
            logits, chosen = score(hidden[:, places]), labels[:, places]
            # The factors per token join the hidden states, which are narrower.
            factors = -coefficients[:, places]
            if side is None:
                left = self._derivatives(kind, logits.to(factors), chosen)
            else:
                scale = self._scores.scale / self._scores.temperature
                turned = turn_softmax(logits, chosen, scale, side)
                left = Side(turned, folded=True, turned=True)
                factors = scale * factors
            self._add_product(batch, left, hidden[:, places], factors)

    def _side(self, batch: Batch, logits: Tensor) -> OneSide | None:
        """Return the side that a kernel reads these logits for, if there is one."""
        if self._scores.softcap is not None or "bias" in self.names:
            return None
        name, shared = self.names.get("weight"), batch.shared
        if name is None or shared is None or shared.is_scaled:
            return None
        return shared.side(name, 0, logits)

    def _derivatives(
        self, kind: Literal["log_probs", "entropy"], logits: Tensor, labels: Tensor
    ) -> Tensor:
        """Return minus the derivatives of a quantity per token by the logits."""
        scores, slope = self._scores(logits)
        if kind == "entropy":
            left = _entropy_part(scores)
        else:
            left, place = scores.softmax(-1), labels.unsqueeze(-1)
            left.scatter_(-1, place, left.gather(-1, place) - 1)
        return left.mul_(slope) if isinstance(slope, Tensor) or slope != 1 else left

    def _add_product(
        self, batch: Batch, left: Tensor | Side, hidden: Tensor, factors: Tensor
    ) -> None:
        """Add the sum over tokens of factor * left (x) hidden to the weight's rows."""
        sums, name = batch.sums, self.names.get("weight")
        if name is not None:
            right = hidden.to(factors) * factors.unsqueeze(-1)
            sums.add_outer(name, left, right)
        if (name := self.names.get("bias")) is not None:
            assert isinstance(left, Tensor)
            sums.add(name, torch.bmm(factors.unsqueeze(1), left).squeeze(1))

    def _whole(self) -> AbstractContextManager[Any]:
        """Return a context in which the head's parameters are whole, under ZeRO-3."""
        return gathered([] if self.head is None else self.head.parameters())

    def _head(self) -> Callable[[Tensor], Tensor]:
        """Return what computes logits of hidden states."""
        dtype = self._autocast or self.head.weight.dtype
        weight, bias = self.head.weight.detach().to(dtype), self.head.bias
        bias = None if bias is None else bias.detach().to(dtype)

        def score(hidden: Tensor) -> Tensor:
            return nn.functional.linear(hidden.to(dtype), weight, bias)

        return score

    def _fit(self, hidden: Tensor, labels: Tensor, log_probs: Tensor) -> None:
        """Find the temperature by the log-probabilities of some tokens, once."""
        if self._is_fitted or log_probs.shape != labels.shape:
            return
        places = (labels != IGNORED).nonzero(as_tuple=True)
        some = tuple(place[:_FITTED_TOKENS] for place in places)
        if not len(some[0]):
            return
        logits = self._head()(hidden[some])
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
