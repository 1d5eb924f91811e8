"""How the gradients of a model's modules are read, learned by trying."""

import logging
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from hf_sketch.examples.attempt import attempt
from hf_sketch.examples.batch import Batch
from hf_sketch.examples.calls import ModelCall
from hf_sketch.examples.modules.fused_head import FusedHead
from hf_sketch.examples.modules.hooks import refusal, replay_later, watch_module
from hf_sketch.examples.modules.known_losses import KnownLosses
from hf_sketch.examples.modules.loss_forms import LossForm, loss_form
from hf_sketch.examples.modules.passes import Passes, answers_in
from hf_sketch.examples.modules.plan import Plan, joined
from hf_sketch.examples.modules.position_biases import PositionBiases
from hf_sketch.examples.modules.zeros import ZeroGradients
from hf_sketch.examples.rules.base import NoRule, Rule, kind_of
from hf_sketch.examples.rules.shared_inputs import SharedInputs
from hf_sketch.model.fsdp import in_shards
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.model.state import draws_elsewhere, evaluation_mode
from hf_sketch.sketches.operator import accumulation_dtype
from hf_sketch.sketches.transforms.lazy import is_lazy

logger = logging.getLogger(__name__)


class Reading:
    """The rules for a model's modules, with hooks that apply them.

    Before the first batch of its kind is recorded, `learn` compares each parameter's
    gradients of a few examples with those of a backward pass per example. Where they
    differ, the next best rule is taken: see `Plan`.

    Args:
        model: the model.
        model_sketch: the map.
        verify: whether to compare.
        weights_change: whether weights may change before gradients are taken.
    """

    def __init__(
        self,
        model: nn.Module,
        model_sketch: ModelSketch,
        verify: bool,
        weights_change: bool,
    ) -> None:
        self.batch: Batch | None = None  # the one that is recorded, if any
        self.resting = False  # whether hooks do nothing
        self.parameters = model_sketch.parameters_of(model)
        self.in_shards = in_shards(self.parameters.values())
        self.copies = self.in_shards or weights_change
        first = next(iter(self.parameters.values()))
        # Why the rules are not compared with gradients of single examples, if not.
        self.unverified = _unverified(verify, first)
        self.verifies = self.unverified is None
        self.plan = Plan(model, self.parameters)
        self.model, self.model_sketch = model, model_sketch
        self.draws_elsewhere = draws_elsewhere(model)
        self.passes = Passes(model, self.parameters)
        self._batch_norms = {
            path: m for path, m in model.named_modules() if isinstance(m, _BatchNorm)
        }
        biases = PositionBiases(model, self.parameters, self.in_shards)
        # What reads the parameters of modules by other means than their calls.
        self.readers: list[PositionBiases | FusedHead] = (
            [biases] if biases.names else []
        )
        # Before the first call, which may put other tensors in the parameters' places.
        self.fused_head = FusedHead(model, self.parameters) if self.verifies else None
        self.tried_head = False
        self.dtype = first.dtype
        self.known_losses = KnownLosses()
        self.shared = SharedInputs(model_sketch, accumulation_dtype(first.dtype))
        self.found_form: LossForm | None = None  # of the model's loss, if unknown
        self._undo: list[Callable[[], object]] = []
        # Kinds of modules, in verified calls of each kind.
        self._situations: dict[object, set[str]] = {}
        self.called: set[str] = set()  # kinds of modules, in verified calls
        self.whole = False  # whether a few examples are too few to try with
        self.zeros = ZeroGradients()

    def watch(self) -> None:
        """Put hooks on the modules."""
        for rule in self.plan.rules:
            if not any(reader.covers(rule.module) for reader in self.readers):
                self._undo += watch_module(rule, self._current, self.in_shards)
        for reader in self.readers:
            self._undo += reader.register(self._current)

    def unwatch(self) -> None:
        """Take the hooks off."""
        while self._undo:
            self._undo.pop()()

    def clear(self) -> None:
        """Let go of the last batch's tensors."""
        self.shared.clear()
        for reader in self.readers:
            reader.clear()

    def knows(self, call: ModelCall) -> bool:
        """Return whether nothing has to be learned before this call."""
        if not self.verifies:
            return True
        if self.zeros.are_due:
            return False
        if call.situation in self._situations:
            return True
        if self.in_shards and self._situations:  # other processes do not learn now
            self._note_difference()
            return True
        return False

    def note(self, call: ModelCall, called: set[str]) -> None:
        """Note that rules are known for calls like this, and what is called then."""
        for rule in self.plan.rules:
            rule.forget()  # what holds in evaluation mode alone
        self._situations[call.situation] = called
        self.called |= called

    def check_independence(self) -> None:
        """Raise if a module that the model calls lets examples see each other."""
        for path, module in self._batch_norms.items():
            called = self.unverified is not None or kind_of(path) in self.called
            if module.training and called:
                raise ValueError(
                    "per-example gradients need examples that do not see each other, "
                    f"got {type(module).__name__} in training mode: call .eval() on it,"
                    " replace it by GroupNorm, or pass per_example=False."
                )

    def go_unverified(self, reason: str) -> None:
        """Take the rules as they are, since they could not be compared."""
        self.unverified = reason
        warnings.warn(
            "The gradients of modules were not compared with those of single examples: "
            f"{reason}. They may still be right.",
            stacklevel=2,
        )
        self.called |= {kind_of(rule.path) for rule in self.plan.rules}

    @contextmanager
    def rest(self) -> Generator[None]:
        """Within, calls of the model are no batches."""
        before, self.resting = self.resting, True
        try:
            yield
        finally:
            self.resting = before

    @property
    def penalised(self) -> bool:
        """Whether the model's loss is known to have a penalty on weights."""
        return self.found_form == "penalty"

    def loss_form(self, call: ModelCall) -> LossForm:
        """Return how a loss of unknown form adds up over examples; see `loss_form`.

        In shards, all processes have found that out as they tried the rules.
        """
        if self.found_form is None and self.verifies and not self.in_shards:
            self.found_form = "shares"
            call, sketch = call.without_cache(self.model), self.model_sketch
            with (
                attempt(),  # some models have no gradients in evaluation mode
                self.rest(),
                evaluation_mode(self.model),
                torch.enable_grad(),
            ):
                self.found_form = loss_form(self.passes, call, sketch, self.dtype)
        return self.found_form or "shares"

    def rescue(self, batch: Batch, call: ModelCall, output: Any) -> None:
        """Run the model again for modules that did what no call before has shown.

        So do modules whose kind is called in verified calls, and not here: the weights
        may be used without them.

        Raises:
            ValueError: the gradients of their parameters cannot be read.
        """
        if batch.failure is not None:  # hooks have stopped since
            return
        strange = [
            rule
            for rule in self.plan.rules
            if rule.path in batch.called and kind_of(rule.path) not in self.called
        ]
        skipped = self._skipped(batch, call) if self.verifies else []
        if self.in_shards and self.verifies and (strange or skipped):
            self._note_difference()
            strange, skipped = [], []
        chosen = {*batch.unclear, *(strange if self.verifies else ())}
        if not (chosen or skipped):
            return
        answers = answers_in(output, batch.split)
        whole = self.verifies and not self.in_shards
        divided = whole and any(x.dim() for x in answers)
        if not (divided or chosen):
            return
        if not divided:
            shape = [tuple(answer.shape) for answer in answers]
            raise refusal(next(iter(chosen)), batch.split, shape)
        names = {
            joined(rule.path, attribute): name
            for rule in {*chosen, *skipped}
            for attribute, name in rule.names.items()
        }
        batch.rescued = frozenset(names.values())
        rule = NoRule(self.model, "", names)
        state = batch.random_states[""]
        replay_later(rule, names, batch, call.args, call.kwargs, answers, state, True)
        if chosen:
            self._situations.clear()
            self.whole = True

    def _note_difference(self) -> None:
        """Note what was not tried before the first batch of all processes."""
        if self.unverified is None:
            self.go_unverified("later batches are of another kind than the first")

    def _skipped(self, batch: Batch, call: ModelCall) -> list[Rule]:
        """Return rules of kinds that verified calls show, and this call does not."""
        if batch.follows and not batch.seen:  # it returns what an earlier one made
            return []
        # The model's own call has not ended yet.
        kinds = {"", *(kind_of(path) for path in batch.seen)}
        missing = self._situations.get(call.situation, set()) - kinds
        return [
            rule
            for rule in self.plan.rules
            if kind_of(rule.path) in missing
            and not any(reader.covers(rule.module) for reader in self.readers)
        ]

    def _current(self) -> Batch | None:
        return self.batch


def _unverified(verify: bool, parameter: nn.Parameter) -> str | None:
    """Why the rules are not compared with gradients of single examples; None if so."""
    if not verify:
        return "it was switched off"
    lazy = is_lazy(parameter)
    return "the device would compile each backward pass" if lazy else None
