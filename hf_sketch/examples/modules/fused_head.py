"""The rule of output embeddings that a fused loss uses without calling them."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_sketch.examples.attempt import OUT_OF_MEMORY
from hf_sketch.examples.batch import Batch
from hf_sketch.examples.calls import IGNORED, loss_of, next_labels
from hf_sketch.examples.comparison import first_met
from hf_sketch.examples.modules.head_scores import HeadScores
from hf_sketch.model.fsdp import in_shards, made_whole
from hf_sketch.processes import of_each
from hf_sketch.sketches.operator import accumulation_dtype
from hf_sketch.sketches.outer import Side
from hf_sketch.sketches.two_sided.turning import OneSide, turn_softmax

_HIDDEN = "last_hidden_state"
_KINDS: tuple[Literal["log_probs", "entropy"], ...] = ("log_probs", "entropy")
_LOGITS_AT_ONCE = 2**24
_LOGITS_OF_A_KERNEL = 2**26  # enough programs for a device
_FITTED_TOKENS = 64


class FusedHead:
    """Reads the gradients of a head whose logits a fused loss never keeps.

    Such losses (TRL's, Liger's, cut cross-entropy) call the model's body and take the
    head's weight by themselves. The gradient of a token's log-probability is its
    coefficient times (one-hot minus softmax), outer its hidden state. The coefficient
    is the gradient of the model's `log_probs`; of a loss that comes without them, or
    not of them, each token has the same. Scores are computed again, a few tokens at a
    time, in the precision of the forward pass.

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
        self._scores, self._is_fitted = HeadScores.of(self._owner), False
        self._hidden: Tensor | None = None
        self._autocast: torch.dtype | None = None
        self._in_shards = in_shards(parameters.values())
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
            self._fit(hidden, labels, log_probs.detach())
            for kind in _KINDS:
                if isinstance(x := output.get(kind), Tensor) and x.requires_grad:
                    batch.watch(x, partial(self._add, batch, hidden, labels, kind))
            loss = self._apart(loss, log_probs)
        if loss is not None and loss.requires_grad:
            read = partial(self._add_evenly, batch, hidden, labels)
            batch.watch(loss, read)

    def _apart(self, loss: Tensor | None, log_probs: Tensor) -> Tensor | None:
        """Return the loss if it does not come of the log-probabilities beside it."""
        if self._is_apart is None and loss is not None and loss.requires_grad:
            self._is_apart = not first_met(loss, [log_probs])
        return loss if self._is_apart else None

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
        try:
            with self._scoring(hidden) as score:
                self._add_rows(batch, score, hidden, labels, kind, coefficients)
        except OUT_OF_MEMORY as error:
            if not self._in_shards:
                raise
            # Others would wait for this process to make the head whole the next time.
            raise RuntimeError(
                f"the gradients of the head did not fit into memory ({error}): pass a "
                "smaller per_device_train_batch_size, or per_example=False."
            ) from None

    def _add_rows(
        self,
        batch: Batch,
        score: Callable[[Tensor], Tensor],
        hidden: Tensor,
        labels: Tensor,
        kind: Literal["log_probs", "entropy"],
        coefficients: Tensor,
    ) -> None:
        """As `_add`, for one row per example, given what computes logits."""
        side = self._side(batch, score(hidden[:0])) if kind == "log_probs" else None
        at_once = _LOGITS_AT_ONCE if side is None else _LOGITS_OF_A_KERNEL
        each = max(1, at_once // (len(labels) * score(hidden[:0]).shape[-1]))
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

    @contextmanager
    def _scoring(self, hidden: Tensor) -> Generator[Callable[[Tensor], Tensor]]:
        """Yield what computes logits of hidden states; all processes must enter it."""
        own = [self.head.weight, *([] if self.head.bias is None else [self.head.bias])]
        # FSDP2 has parameters in another precision than modules use them in.
        plain = hidden.dtype if self._in_shards else self.head.weight.dtype
        dtype = self._autocast or plain
        with made_whole(own) as whole:
            weight, *bias = (x.to(dtype) for x in whole)
            yield lambda some: nn.functional.linear(some.to(dtype), weight, *bias)

    def _fit(self, hidden: Tensor, labels: Tensor, log_probs: Tensor) -> None:
        """Find the temperature by the log-probabilities of some tokens, once."""
        if self._is_fitted or log_probs.shape != labels.shape:
            return
        places = (labels != IGNORED).nonzero(as_tuple=True)
        some = tuple(place[:_FITTED_TOKENS] for place in places)
        with self._scoring(hidden) as score:
            if len(some[0]):
                logits = score(hidden[some])
                self._scores = self._scores.fitted(
                    logits, labels[some], log_probs[some]
                )
                self._is_fitted = True
        if self._in_shards:  # else some would wait for others to score
            self._is_fitted = all(of_each(self._is_fitted))


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
