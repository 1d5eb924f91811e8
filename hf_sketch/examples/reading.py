"""How the gradients of a model's modules are read, learned by trying."""

import logging
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_sketch.examples.batch import Batch
from hf_sketch.examples.calls import ModelCall
from hf_sketch.examples.hooks import refusal, replay_later, watch_module
from hf_sketch.examples.named_sums import NamedSums
from hf_sketch.examples.plan import Plan, joined
from hf_sketch.examples.position_biases import PositionBiases
from hf_sketch.examples.probe import (
    EXAMPLES,
    LossForm,
    Reference,
    answers_in,
    computed_dtype,
    loss_form,
    reference_of,
    same_answers,
)
from hf_sketch.examples.rules.base import NoRule, Rule, kind_of
from hf_sketch.examples.split import Rows
from hf_sketch.model.fsdp import in_row_shards
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.model.state import evaluation_mode
from hf_sketch.sketches.transforms.lazy import is_lazy

logger = logging.getLogger(__name__)

_ROUNDS = 12


class Reading:
    """The rules for a model's modules, with hooks that apply them.

    Before the first batch of its kind is recorded, `learn` compares each parameter's
    gradients of a few examples with those of a backward pass per example. Where they
    differ, the next best rule is taken: see `Plan`.

    Args:
        model: the model.
        model_sketch: the map.
        verify: whether to compare.
    """

    def __init__(
        self, model: nn.Module, model_sketch: ModelSketch, verify: bool
    ) -> None:
        self.batch: Batch | None = None  # the one that is recorded, if any
        self.resting = False  # whether hooks do nothing
        self.parameters = model_sketch.parameters_of(model)
        self.in_shards = in_row_shards(self.parameters.values())
        first = next(iter(self.parameters.values()))
        # No process could gather the gradients alone; a lazy device would compile each.
        self.verifies = verify and not self.in_shards and not is_lazy(first)
        self.plan = Plan(model, self.parameters)
        self._model, self._model_sketch = model, model_sketch
        self._biases: PositionBiases | None = PositionBiases(
            model, self.parameters, self.in_shards
        )
        if not self._biases.tables:
            self._biases = None
        self._loss_form: LossForm | None = None
        self._undo: list[Callable[[], object]] = []
        self._situations: set[object] = set()
        self._called: set[str] = set()  # kinds of modules, in verified calls
        self._whole = False  # whether a few examples are too few to try with

    def watch(self) -> None:
        """Put hooks on the modules."""
        for rule in self.plan.rules:
            if self._biases is None or not self._biases.covers(rule.module):
                handles = watch_module(rule, self._current, self.in_shards)
                self._undo += [handle.remove for handle in handles]
        if self._biases is not None:
            self._undo += self._biases.register(self._current)

    def unwatch(self) -> None:
        """Take the hooks off."""
        while self._undo:
            self._undo.pop()()

    def clear(self) -> None:
        """Let go of the last batch's tensors."""
        if self._biases is not None:
            self._biases.clear()

    def knows(self, call: ModelCall) -> bool:
        """Return whether nothing has to be learned before this call."""
        return not self.verifies or call.situation in self._situations

    def learn(self, call: ModelCall) -> None:
        """Find out by which rules the gradients of a batch like this are read.

        Raises:
            ValueError: examples see each other, or a parameter's gradients cannot be
                read.
        """
        self.unwatch()
        try:
            with self.rest(), evaluation_mode(self._model), torch.enable_grad():
                self._learn(call.without_cache(self._model))
        finally:
            self.watch()
        for rule in self.plan.rules:
            rule.forget()  # what holds in evaluation mode alone
        self._situations.add(call.situation)

    @contextmanager
    def rest(self) -> Generator[None]:
        """Within, calls of the model are no batches."""
        before, self.resting = self.resting, True
        try:
            yield
        finally:
            self.resting = before

    def loss_form(self, call: ModelCall) -> LossForm:
        """Return how a loss of unknown form adds up over examples; see `loss_form`."""
        if not self.verifies:
            return "shares"
        if self._loss_form is None:
            call, sketch = call.without_cache(self._model), self._model_sketch
            with self.rest(), evaluation_mode(self._model), torch.enable_grad():
                self._loss_form = loss_form(self._model, call, self.parameters, sketch)
        return self._loss_form

    def rescue(self, batch: Batch, call: ModelCall, output: Any) -> None:
        """Run the model again for modules that did what no call before has shown.

        Raises:
            ValueError: the gradients of their parameters cannot be read.
        """
        strange = [
            rule
            for rule in self.plan.rules
            if rule.path in batch.called and kind_of(rule.path) not in self._called
        ]
        chosen = {*batch.unclear, *(strange if self.verifies else ())}
        if not chosen:
            return
        answers = answers_in(output, batch.split)
        if not self.verifies or not any(x.dim() for x in answers):
            shape = [tuple(answer.shape) for answer in answers]
            raise refusal(next(iter(chosen)), batch.split, shape)
        names = {
            joined(rule.path, attribute): name
            for rule in chosen
            for attribute, name in rule.names.items()
        }
        batch.rescued = frozenset(names.values())
        rule = NoRule(self._model, "", names)
        state = batch.random_states[""]
        replay_later(rule, names, batch, call.args, call.kwargs, answers, state, True)
        self._situations.clear()
        self._whole = True

    def _current(self) -> Batch | None:
        return self.batch

    def _learn(self, call: ModelCall) -> None:
        """Demote rules until their gradients are those of the reference."""
        reference = self._reference(call)
        if reference is None:
            return
        self._check_independence(reference)
        for _ in range(_ROUNDS):
            failed = self._failing(reference)
            if not failed:
                break
            self._demote(failed, reference)
        self._called |= {kind_of(path) for path in reference.called}

    def _reference(self, call: ModelCall) -> Reference | None:
        """Return gradients to compare with: of a few examples, if they can be apart."""

        def reference(call: ModelCall) -> Reference | None:
            return reference_of(self._model, call, self.parameters, self._model_sketch)

        few = isinstance(call.split, Rows) and call.split.size > EXAMPLES
        if few and not self._whole:
            try:
                return reference(call.part(0, EXAMPLES))
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # inputs need not divide
                logger.info("Examples cannot be taken out of their batch: %r", error)
        return reference(call)

    def _check_independence(self, reference: Reference) -> None:
        """Raise if an example's answers depend on the other examples."""
        split = reference.call.split
        if not isinstance(split, Rows) or split.size == 1 or reference.is_of_loss:
            return
        try:
            alone = self._answers(reference.call.part(0, 1))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # inputs need not divide
            logger.info("An example cannot be taken out of its batch: %r", error)
            return
        expected = [split.part(answer, 0) for answer in reference.answers]
        if len(alone) != len(expected) or same_answers(alone, expected):
            return
        if same_answers(self._answers(reference.call), reference.answers):
            raise ValueError(
                "per-example gradients need examples that do not see each other, but "
                f"{type(self._model).__name__} gives an example other outputs without "
                "its batch-mates: pass per_example=False."
            )

    def _answers(self, call: ModelCall) -> list[Tensor]:
        """Return what the model answers to a call."""
        return answers_in(self._model(*call.args, **call.kwargs), call.split)

    def _failing(self, reference: Reference) -> Collection[Rule]:
        """Return the rules whose gradients are not those of the reference."""
        batch = self._tried(reference)
        while batch is None:
            batch = self._tried(reference)
        if batch.failure is not None:
            raise MemoryError(batch.failure)
        assert isinstance(batch.sums, NamedSums)
        parameter = next(iter(self.parameters.values()))
        errors = reference.differing(batch.sums, computed_dtype(parameter))
        blamed = batch.blamed or {}
        failed = {*blamed, *batch.unclear, *self.plan.of(errors)}
        for rule in failed:
            worst = max((errors.get(n, 0.0) for n in rule.names.values()), default=0.0)
            reason = blamed.get(rule) or f"off by {worst:.1g}"
            logger.info("%s does not fit %s: %s", type(rule).__name__, rule, reason)
        return failed

    def _tried(self, reference: Reference) -> Batch | None:
        """Return a batch with its gradients; None if hooks changed what came out.

        Outputs are not given to each example then.
        """
        call, outputs = reference.call, list[Tensor]()
        sums = reference.gradients.empty()
        batch = Batch(call.inputs, call.split, sums, self.in_shards, outputs, "forward")
        batch.blamed = {}
        self.watch()
        self.batch = batch
        try:
            try:
                answers = self._answers(call)
            except Exception:
                if not (batch.expanded or self._biases):
                    raise
                answers = []
            if not same_answers(answers, reference.answers):
                self._stop_expanding(batch)
                return None
            batch.phase = "loss"
            wanted = [x for x in outputs if x.requires_grad]
            if wanted:
                probes = reference.probes
                torch.autograd.grad(answers, wanted, probes, allow_unused=True)
            self.batch = None
            batch.run_again()
            return batch
        finally:
            self.batch = None
            self.unwatch()
            self.clear()
            outputs.clear()  # their hooks hold the batch, and the batch holds them

    def _stop_expanding(self, batch: Batch) -> None:
        """Let examples share outputs, for modules of the kinds that gave them away."""
        kinds = {rule.kind for rule in batch.expanded}
        if not (kinds or self._biases):
            raise RuntimeError(
                f"{type(self._model).__name__} must give the same outputs when it is "
                "called again, got others: pass per_example=False."
            )
        self._biases = None
        for rule in self.plan.rules:
            rule.expands = rule.expands and rule.kind not in kinds

    def _demote(self, failed: Collection[Rule], reference: Reference) -> None:
        """Take the next best rules."""
        if self._biases is not None and any(
            self._biases.covers(rule.module) for rule in failed
        ):
            self._biases = None
        else:
            self.plan.demote(failed, reference.called)
