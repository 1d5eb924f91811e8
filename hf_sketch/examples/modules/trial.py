"""Trying rules on a few examples, beside a backward pass for each."""

import logging
from collections.abc import Collection
from typing import TypeVar

import torch
from torch import Tensor, nn

from hf_sketch.examples.attempt import RefusalError, attempt
from hf_sketch.examples.batch import Batch
from hf_sketch.examples.calls import ModelCall
from hf_sketch.examples.modules.jointly import (
    calls_to_try,
    check_others,
    failed_alone,
)
from hf_sketch.examples.modules.loss_forms import EXAMPLES, LossForm, loss_form
from hf_sketch.examples.modules.passes import answers_in
from hf_sketch.examples.modules.position_biases import PositionBiases
from hf_sketch.examples.modules.probe import (
    Reference,
    reference_of,
    same_answers,
)
from hf_sketch.examples.modules.reading import Reading
from hf_sketch.examples.named_sums import NamedSums
from hf_sketch.examples.rules.base import Rule, kind_of
from hf_sketch.examples.split import Packed, Rows
from hf_sketch.model.fsdp import begin_again, without_shard_hooks
from hf_sketch.model.state import evaluation_mode, without_zeros
from hf_sketch.processes import of_first

Value = TypeVar("Value")
logger = logging.getLogger(__name__)

_ROUNDS = 12


class Trial:
    """Tries a reading's rules until all gradients are those of single examples.

    Args:
        reading: the rules, of which those that fail are replaced.
    """

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._model_name = type(reading.model).__name__

    def run(self, call: ModelCall, needed: bool = True) -> set[str] | None:
        """Replace rules until their gradients are those of the reference.

        Args:
            call: the call.
            needed: go unverified if nothing can be compared.

        Returns:
            the kinds of the modules that were called; None if nothing was compared.

        Raises:
            ValueError: examples see each other, or a parameter's gradients cannot be
                read.
        """
        reference = None
        with attempt() as tried:  # some models have no gradients in evaluation mode
            reference = self._reference(call.detached() if call.goes_on else call)
        check_others(tried, self._reading.in_shards)
        if reference is None and call.goes_on and tried.error is None:
            return set()  # all that trains is in the call before
        if reference is None:
            if needed:
                reason = tried.error or "it gives nothing to compare"
                self._reading.go_unverified(reason)
            return None
        self._reading.dtype = reference.dtype
        self._check_independence(reference)
        self._find_fused_head(reference)
        for _ in range(_ROUNDS):
            failed = self._failing(reference)
            if not failed:
                break
            self._demote(failed, reference)
        if self._reading.in_shards:
            self._reading.zeros.note(self._agreed(reference.nonzero()))
            self._find_loss_form(call, reference)
        return {kind_of(path) for path in reference.called}

    def _reference(self, call: ModelCall) -> Reference | None:
        """Return gradients to compare with: of a few examples, if they can be apart."""
        passes = self._reading.passes

        def reference(call: ModelCall) -> Reference | None:
            return reference_of(passes, call, self._reading.model_sketch)

        few = isinstance(call.split, Rows) and call.split.size > EXAMPLES
        if few and not (self._reading.whole or call.split.is_uneven):
            found = None
            with attempt() as tried:  # inputs need not divide
                found = reference(call.part(0, EXAMPLES))
            check_others(tried, self._reading.in_shards)
            if tried.error is None:
                return found
            logger.info("Examples cannot leave their batch: %s", tried.error)
        return reference(call)

    def _check_independence(self, reference: Reference) -> None:
        """Raise if an example's answers depend on the other examples."""
        split = reference.call.split
        if not isinstance(split, Rows) or split.size == 1 or reference.is_of_loss:
            return
        for index in range(reference.examples):
            alone: list[Tensor] = []
            part = reference.call.part(index, 1)
            with attempt() as tried:  # inputs need not divide
                alone = part.without_padding(self._answers(part))
            check_others(tried, self._reading.in_shards)
            if tried.error is not None:
                logger.info("Examples cannot leave their batch: %s", tried.error)
                return
            expected = [split.part(answer, index) for answer in reference.answers]
            expected = part.without_padding(expected)
            if len(alone) == len(expected) and not self._agreed(
                same_answers(alone, expected, "rule")
            ):
                self._check_repetition(reference)

    def _check_repetition(self, reference: Reference) -> None:
        """Raise if the answers, which differ alone, are the same in the batch."""
        again = self._answers(reference.call)
        if self._agreed(same_answers(again, reference.answers)):
            raise RefusalError(
                "per-example gradients need examples that do not see each other, but "
                f"{self._model_name} gives an example other outputs without its "
                "batch-mates: pass per_example=False."
            )

    def _find_fused_head(self, reference: Reference) -> None:
        """Read the head by other means if the model did not call it."""
        head = self._reading.fused_head
        assert head is not None
        skipped = [
            rule
            for rule in self._reading.plan.rules
            if head.covers(rule.module) and rule.path not in reference.called
        ]
        has_logits = any(answer.dim() > 2 for answer in reference.answers)
        if not skipped or has_logits:
            return
        if head.names and not self._reading.tried_head:
            self._reading.tried_head = True
            self._reading.readers.append(head)

    def _find_loss_form(self, call: ModelCall, reference: Reference) -> None:
        """Find out how a loss of unknown form adds up, while all processes may try."""
        reading = self._reading
        if reading.found_form is not None or self._agreed(reference.knows_loss):
            return
        form: LossForm = "shares"
        with attempt() as tried:
            form = loss_form(reading.passes, call, reading.model_sketch, reading.dtype)
        check_others(tried, reading.in_shards)
        reading.found_form = "shares" if form == "penalty" else form

    def _agreed(self, value: Value) -> Value:
        """Return the first process's value where all try together."""
        return of_first(value) if self._reading.in_shards else value

    def _answers(self, call: ModelCall) -> list[Tensor]:
        """Return what the model answers to a call."""
        return answers_in(call.run(self._reading.model), call.split)

    def _failing(self, reference: Reference) -> Collection[Rule]:
        """Return the rules whose gradients are not those of the reference."""
        batch = self._tried(reference)
        while batch is None:
            batch = self._tried(reference)
        if batch.failure is not None:
            raise MemoryError(batch.failure)
        assert isinstance(batch.sums, NamedSums)
        errors = self._agreed(reference.differing(batch.sums))
        blamed = batch.blamed or {}
        failed = {*blamed, *batch.unclear, *self._reading.plan.of(errors)}
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
        batch = Batch(call, sums, self._reading.in_shards, outputs, "forward")
        batch.blamed = {}
        self._reading.watch()
        self._reading.batch = batch
        try:
            answers: list[Tensor] = []
            with attempt() as tried:  # what hooks gave to each example may not fit
                answers = self._answers(call)
            check_others(tried, self._reading.in_shards)
            if not self._agreed(same_answers(answers, reference.answers)):
                self._stop_expanding(batch)
                return None
            batch.phase = "loss"
            wanted = [x for x in outputs if x.requires_grad]
            if wanted:
                probes = reference.probes
                torch.autograd.grad(answers, wanted, probes, allow_unused=True)
            self._reading.batch = None
            batch.run_again()
            return batch
        finally:
            self._reading.batch = None
            self._reading.unwatch()
            self._reading.clear()
            outputs.clear()  # their hooks hold the batch, and the batch holds them

    def _stop_expanding(self, batch: Batch) -> None:
        """Let examples share outputs, for modules of the kinds that gave them away."""
        kinds = {rule.kind for rule in batch.expanded}
        if not (kinds or self._biases):
            raise RuntimeError(
                f"{self._model_name} must give the same outputs when it is "
                "called again, got others: pass per_example=False."
            )
        self._reading.readers = [
            r for r in self._reading.readers if r not in self._biases
        ]
        for rule in self._reading.plan.rules:
            rule.expands = rule.expands and rule.kind not in kinds

    @property
    def _biases(self) -> list[PositionBiases]:
        """Return the readings that give outputs to each example."""
        return [r for r in self._reading.readers if isinstance(r, PositionBiases)]

    def _demote(self, failed: Collection[Rule], reference: Reference) -> None:
        """Take the next best rules."""
        left = [
            reader
            for reader in self._reading.readers
            if not any(reader.covers(rule.module) for rule in failed)
        ]
        if len(left) < len(self._reading.readers):
            self._reading.readers = left
        else:
            self._reading.plan.demote(failed, reference.called)


def learn(reading: Reading, call: ModelCall) -> None:
    """Find out by which rules the gradients of a batch like this are read.

    Where parameters are in shards, all processes call together, once. They try the same
    examples, so that all make the same calls.

    Raises:
        ValueError: examples see each other, or a parameter's gradients cannot be read.
    """
    reading.unwatch()
    reading.zeros.begin_trial()
    found: list[tuple[ModelCall, set[str]]] = []
    try:
        zeros = () if reading.in_shards else reading.parameters.values()
        with (
            reading.rest(),
            evaluation_mode(reading.model),
            without_shard_hooks(reading.model, forward=False),
            without_zeros(zeros),
            torch.enable_grad(),
        ):
            for tried, needed in calls_to_try(reading, call):
                called = Trial(reading).run(_plain(tried, reading.model), needed)
                if needed or called is not None:
                    found.append((tried, called or set()))
        begin_again(reading.model)  # together, so that one that failed must not
    except (MemoryError, torch.OutOfMemoryError) as failure:
        if reading.in_shards:
            raise failed_alone(f"out of memory ({failure})") from failure
        reading.go_unverified(f"out of memory ({failure})")
    finally:
        torch.clear_autocast_cache()  # of weights, with the graphs of these calls
        reading.watch()
    if reading.zeros.given_up is not None:
        reading.go_unverified(reading.zeros.given_up)
    for tried, kinds in found or [(call, set[str]())]:
        reading.note(tried, kinds)


def _plain(call: ModelCall, model: nn.Module) -> ModelCall:
    """Return the call without a cache, but of documents: they would see each other."""
    return call if isinstance(call.split, Packed) else call.without_cache(model)
