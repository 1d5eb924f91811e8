"""Per-example gradient sketches out of one ordinary backward pass."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_sketch.examples.backward_pass import BackwardPass, late_call
from hf_sketch.examples.batch import Batch, ExampleBatch, Holding
from hf_sketch.examples.calls import ModelCall, known_loss, loss_of
from hf_sketch.examples.coverage import ModuleCoverage
from hf_sketch.examples.losses import check_reduction
from hf_sketch.examples.media import placeholders_of
from hf_sketch.examples.modules.passes import answers_in
from hf_sketch.examples.modules.reading import Reading
from hf_sketch.examples.modules.trial import learn
from hf_sketch.examples.own_loss import TokenMeans, adds_penalty, split_loss
from hf_sketch.examples.rules.base import tensors_of
from hf_sketch.examples.split import ExampleSplit, split_of
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.model.state import own_forward, random_state
from hf_sketch.sketches.operator import accumulation_dtype

ExampleLossFunction = Callable[[Any, Mapping[str, Any]], Tensor]


class ExampleSketcher:
    """Sketches each example's gradient while a backward pass runs.

    Used as a context manager: inside it, modules with trainable parameters carry hooks
    that read their input and their output's gradient. While `recording` is true, each
    backward pass is followed by one `take`; before it, the model may be called several
    times. Neither the loss nor any gradient nor any random number changes.

    Every trainable parameter is covered: by a rule of its module (docs/per_example.md
    lists them), or by running the module again for each example, or the module around
    it. Documents packed into one row are examples of their own.

    Args:
        model: a model called with named tensors.
        model_sketch: the map; its parameters must be the model's trainable ones.
        loss: an example's own loss is the "mean" or the "sum" over its tokens.
        verify: compare each parameter's gradients of two examples with those of a
            backward pass per example before the first batch of its kind is recorded,
            and read them another way where they differ (in shards, by all processes).
        weights_change: the optimizer may step before `take`.

    Raises:
        ValueError: the sketch is of another model, or a module's gradients depend on
            the whole batch; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        model_sketch: ModelSketch,
        loss: str = "mean",
        verify: bool = True,
        weights_change: bool = False,
    ) -> None:
        check_reduction(loss)
        self.model = model
        self.model_sketch = model_sketch
        self.loss = loss
        self.recording = True
        self.keeps_answers = False  # of the model's calls, until their loss is checked
        self._reading = Reading(model, model_sketch, verify, weights_change)
        self._token_means = TokenMeans()
        self.parameters = self._reading.parameters
        self._handles: list[RemovableHandle] = []
        self.backward_pass = BackwardPass()  # that the model's calls await
        self._forward: Any = None  # of the model, if it is not its class's

    def __enter__(self) -> "ExampleSketcher":
        model = self.model
        self._forward = vars(model).get("forward")
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        if not self._reading.in_shards:  # where hooks run for unused parameters, too
            for name, parameter in self.parameters.items():
                hook = partial(self._note_reached, name)
                handle = parameter.register_post_accumulate_grad_hook(hook)
                self._handles.append(handle)
        self._reading.watch()
        return self

    def __exit__(self, *_: object) -> None:
        self._reading.batch, self.backward_pass.calls = None, []
        self._reading.unwatch()
        while self._handles:
            self._handles.pop().remove()

    def start_step(self) -> None:
        """Note that the optimizer may have stepped, so that rules are tried again."""
        self._reading.zeros.start_step()

    def take(self, loss_scale: float = 1.0) -> ExampleBatch:
        """Return the rows of the batch whose backward pass has just run.

        Args:
            loss_scale: what the loss was multiplied by before the backward pass, as a
                GradScaler does; the weights are without it.

        Raises:
            RuntimeError: no forward and backward pass ran since the last call, or a
                parameter has a gradient that no module's call explains.
            MemoryError: memory ran out while gradients were read.
        """
        self._reading.batch = None
        try:
            with self._reading.rest():
                return self.backward_pass.take(self.parameters, loss_scale)
        finally:
            self._reading.clear()

    def sketch(
        self,
        inputs: Mapping[str, Any],
        loss_fn: ExampleLossFunction | None = None,
    ) -> ExampleBatch:
        """Run the model on a batch and sketch its examples' gradients.

        No parameter's `.grad` is computed or touched.

        Args:
            inputs: what the model is called with.
            loss_fn: takes the model's output and `inputs`, returns each example's own
                loss, (b,); by default the model's loss is taken.

        Raises:
            ValueError: the model returns no loss.
        """
        if not self._handles:
            raise RuntimeError(
                "`sketch` reads through hooks, got none: call it inside "
                "`with ExampleSketcher(...)`."
            )
        call = ModelCall.of(self.model, (), dict(inputs)).without_cache(self.model)
        outputs: list[Tensor] = []
        try:
            batch = self._reading.batch = self._start(call, outputs)
            with torch.enable_grad():
                output = self.model(**call.kwargs)
                losses = None if loss_fn is None else loss_fn(output, inputs)
            if losses is None:
                total = known_loss(output, inputs)
            else:
                total = batch.take_losses(losses)
            torch.autograd.grad(total, outputs, allow_unused=True)
            return self.take()
        finally:
            self._reading.batch, self.backward_pass.calls = None, []
            outputs.clear()  # their hooks hold the batch, and the batch holds them

    def split_of(self, inputs: Mapping[str, Any]) -> ExampleSplit:
        """Return the examples of a batch that the model is called with."""
        return split_of(inputs, self.main_input, placeholders_of(self.model))

    @property
    def coverage(self) -> ModuleCoverage:
        """How each module's gradients are read, as far as it is known by now."""
        return ModuleCoverage.of(self._reading.plan.rules)

    @property
    def unverified(self) -> str | None:
        """Why rows are not compared with gradients of single examples, if not."""
        return self._reading.unverified

    @property
    def main_input(self) -> str:
        """The name of the model's first input."""
        return getattr(self.model, "main_input_name", "input_ids")

    @property
    def checks_losses(self) -> bool:
        """Whether losses of several calls are to be checked before their backward pass.

        In shards, parameters would be gathered for it.
        """
        return self._reading.verifies and not self._reading.in_shards

    @property
    def in_flight(self) -> bool:
        """Whether a batch awaits its backward pass, or is within it."""
        return self._reading.batch is not None

    def note_loss(
        self, loss: Tensor, items: Tensor | int | None = None, first: bool = False
    ) -> None:
        """Find out what a loss that others compute is, before its backward pass.

        Args:
            loss: made of the model's outputs.
            items: the Trainer's `num_items_in_batch`.
            first: look for a term, too, such as one of weights, that no example owns.
        """
        calls, batch = self.backward_pass.calls, self._reading.batch
        with self.backward_pass.muted():
            self._token_means.note(calls, loss, items, self.loss)
        if first and batch is not None and batch.phase == "loss" and loss.requires_grad:
            batch.penalised |= adds_penalty(loss, calls, self.parameters.values())

    @property
    def penalised(self) -> bool:
        """Whether the model's own loss has a penalty on weights, as far as known."""
        return self._reading.penalised

    @contextmanager
    def paused(self) -> Generator[None]:
        """Within, record nothing but what `sketch` is called for.

        An example's own loss is the mean there, as models compute it.
        """
        before = self.recording, self.loss
        self.recording, self.loss = False, "mean"
        try:
            yield
        finally:
            self.recording, self.loss = before

    def _start(self, call: ModelCall, outputs: list[Tensor] | None = None) -> Batch:
        """Return a new batch; one that an error interrupted is forgotten."""
        reading = self._reading
        reading.batch = None
        reading.clear()
        self.backward_pass.begin_call()
        if not reading.knows(call):
            with self.backward_pass.muted(), own_forward(self.model, self._forward):
                learn(reading, call)
        reading.check_independence()
        like = next(iter(self.parameters.values()))
        dtype = accumulation_dtype(like.dtype)
        rows = torch.empty(call.split.size, 0, dtype=dtype, device=like.device)
        sums = self.model_sketch.sketch_sum(rows)
        batch = Batch(call, sums, reading.copies, outputs, shared=reading.shared)
        batch.random_states[""] = random_state(like.device, reading.draws_elsewhere)
        batch.on_gradient = self._resume
        batch.follows = bool(self.backward_pass.calls)
        self.backward_pass.calls.append(batch)
        return batch

    def _resume(self, batch: Batch) -> None:
        """Go on with a batch, whose layers may run again in the backward pass."""
        if batch in self.backward_pass.calls:
            self._reading.batch = batch

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Start a batch, unless `sketch` has."""
        reading = self._reading
        if reading.resting:
            return
        if reading.batch is not None and reading.batch.phase == "new":
            reading.batch.phase = "forward"
        elif self.recording and torch.is_grad_enabled():
            reading.batch = self._start(ModelCall.of(module, args, kwargs))
            reading.batch.phase = "forward"

    def _after(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Split the loss, and watch the scale with which it enters the backward."""
        batch = self._reading.batch
        if batch is None or not torch.is_grad_enabled() or self._reading.resting:
            return
        if batch.phase != "forward" and not self.recording:
            return
        self._reading.batch = None  # until nothing can fail any more
        if batch.phase != "forward":  # the model called itself
            self.backward_pass.calls = []
            raise late_call()
        call = ModelCall(args, kwargs, batch.inputs, batch.split)
        loss = loss_of(output)
        with Holding(batch):
            with self.backward_pass.muted():
                own = split_loss(self._reading, batch, call, output, self.loss)
            with self.backward_pass.muted(but=batch):
                self._reading.rescue(batch, call, output)
                if own is not loss and own is not None:
                    batch.read_apart(own, list(self.parameters.values()))
        batch.watch_outputs(tensors_of(output), loss)
        self._token_means.keep(batch, output, self.loss)
        if self.keeps_answers:
            batch.answers = [x for x in answers_in(output, batch.split) if x.dim()]
        self._reading.batch = batch

    def _note_reached(self, name: str, parameter: Tensor) -> None:
        if self._reading.batch is not None:
            self._reading.batch.reached.add(name)
