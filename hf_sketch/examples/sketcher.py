"""Per-example gradient sketches out of one ordinary backward pass."""

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.utils.hooks import RemovableHandle

from hf_sketch.examples.batch import Batch, ExampleBatch
from hf_sketch.examples.hooks import rules_of, watch_module
from hf_sketch.examples.losses import (
    ExampleLosses,
    check_reduction,
    example_losses,
    is_causal,
)
from hf_sketch.examples.position_biases import PositionBiases
from hf_sketch.examples.split import ExampleSplit, split_of
from hf_sketch.model.fsdp import in_row_shards
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.sketches.operator import accumulation_dtype

ExampleLossFunction = Callable[[Any, Mapping[str, Any]], Tensor]


class ExampleSketcher:
    """Sketches each example's gradient while a backward pass runs.

    Used as a context manager: inside it, modules with trainable parameters carry hooks
    that read their input and their output's gradient. While `recording` is true, each
    forward and backward pass of the model is followed by one `take`. Neither the loss
    nor any gradient nor any random number changes.

    Every trainable parameter is covered: by a rule of its module (Linear, Conv1D,
    Embedding, LayerNorm, every RMSNorm, convolutions), or by running the module again
    for each example. Uses of one parameter add up. Documents packed into one row are
    examples of their own.

    Args:
        model: a model called with named tensors.
        model_sketch: the map; its parameters must be the model's trainable ones.
        loss: an example's own loss is the "mean" or the "sum" over its tokens.

    Raises:
        ValueError: the sketch is of another model, or a module's gradients depend on
            the whole batch; the message names it.
    """

    def __init__(
        self, model: nn.Module, model_sketch: ModelSketch, loss: str = "mean"
    ) -> None:
        check_reduction(loss)
        self.model = model
        self.model_sketch = model_sketch
        self.loss = loss
        self.recording = True
        self.parameters = model_sketch.parameters_of(model)
        self._in_shards = in_row_shards(self.parameters.values())
        self._biases = PositionBiases(model, self.parameters, self._in_shards)
        self._rules = [
            rule
            for rule in rules_of(model, self.parameters)
            if not self._biases.covers(rule.module)
        ]
        self._batch_norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self._undo: list[Callable[[], object]] = []
        self._batch: Batch | None = None

    def __enter__(self) -> "ExampleSketcher":
        model = self.model
        handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        for rule in self._rules:
            handles += watch_module(rule, self._current, self._in_shards)
        if not self._in_shards:  # where hooks run for parameters without use, too
            for name, parameter in self.parameters.items():
                hook = partial(self._note_reached, name)
                handles.append(parameter.register_post_accumulate_grad_hook(hook))
        self._undo = [handle.remove for handle in handles]
        self._undo += self._biases.register(self._current)
        return self

    def __exit__(self, *_: object) -> None:
        self._batch = None
        while self._undo:
            self._undo.pop()()

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
        batch, self._batch = self._batch, None
        try:
            if batch is None or not batch.is_complete:
                raise RuntimeError(
                    "a forward and a backward pass must come before each take(), got "
                    "none: call loss.backward() on the model's loss."
                )
            taken = batch.taken(loss_scale)
            self._check_names(batch)
            return taken
        finally:
            self._biases.clear()

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
        """
        if not self._undo:
            raise RuntimeError(
                "`sketch` reads through hooks, got none: call it inside "
                "`with ExampleSketcher(...)`."
            )
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            inputs = {**inputs, "use_cache": False}
        outputs: list[Tensor] = []
        try:
            batch = self._batch = self._start(inputs, outputs)
            with torch.enable_grad():
                output = self.model(**inputs)
                losses = None if loss_fn is None else loss_fn(output, inputs)
            if losses is None:
                total = field_of(output, "loss", 0)
            else:
                total, ones = losses.sum(), torch.ones_like(losses)
                batch.losses = ExampleLosses(losses.detach(), ones)
                batch.scale = ones.sum() / ones.sum()
            torch.autograd.grad(total, outputs, allow_unused=True)
            return self.take()
        finally:
            self._batch = None
            outputs.clear()  # their hooks hold the batch, and the batch holds them

    def split_of(self, inputs: Mapping[str, Any]) -> ExampleSplit:
        """Return the examples of a batch that the model is called with."""
        return split_of(inputs, self.main_input)

    @property
    def main_input(self) -> str:
        """The name of the model's first input."""
        return getattr(self.model, "main_input_name", "input_ids")

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

    def _current(self) -> Batch | None:
        """Return the batch that is recorded, if any."""
        return self._batch

    def _start(
        self, inputs: Mapping[str, Any], outputs: list[Tensor] | None = None
    ) -> Batch:
        """Return a new batch; one that an error interrupted is forgotten."""
        before, self._batch = self._batch, None
        self._biases.clear()
        if before is not None and before.phase in ("loss", "done"):
            raise _second_call()
        self._check_independence()
        split = self.split_of(inputs)
        like = next(iter(self.parameters.values()))
        total = torch.zeros(
            split.size,
            self.model_sketch.out_size,
            dtype=accumulation_dtype(like.dtype),
            device=like.device,
        )
        sums = self.model_sketch.sketch_sum(total)
        return Batch(inputs, split, sums, self._in_shards, outputs)

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Start a batch, unless `sketch` has."""
        if self._batch is not None and self._batch.phase == "new":
            self._batch.phase = "forward"
        elif self.recording and torch.is_grad_enabled():
            self._batch = self._start(kwargs)
            self._batch.phase = "forward"

    def _after(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Split the loss, and watch the scale with which it enters the backward."""
        batch = self._batch
        if batch is None or not torch.is_grad_enabled():
            return
        if batch.phase != "forward" and not self.recording:
            return
        self._batch = None  # until nothing can fail any more
        if batch.phase != "forward":  # the model called itself
            raise _second_call()
        if (labels := kwargs.get("labels")) is not None:
            loss = field_of(output, "loss", 0)
            with batch.holding_failures():
                batch.losses = example_losses(
                    loss.detach(),
                    field_of(output, "logits", 1),
                    labels,
                    getattr(getattr(module, "config", None), "problem_type", None),
                    reduction=self.loss,
                    items_in_batch=kwargs.get("num_items_in_batch"),
                    causal=is_causal(module),
                    split=batch.split,
                )
            batch.watch_loss(loss)
        batch.phase = "loss"
        self._batch = batch

    def _note_reached(self, name: str, parameter: Tensor) -> None:
        """Note that a backward pass came to a parameter."""
        if self._batch is not None:
            self._batch.reached.add(name)

    def _check_independence(self) -> None:
        """Raise if examples see each other."""
        for module in self._batch_norms:
            if module.training:
                raise ValueError(
                    "per-example gradients need examples that do not see each other, "
                    f"got {type(module).__name__} in training mode: call .eval() on it,"
                    " replace it by GroupNorm, or pass per_example=False."
                )

    def _check_names(self, batch: Batch) -> None:
        """Raise if the batch gave a parameter a gradient, and no contributions.

        Gradients of other micro-batches, and under DDP of other processes, may be there
        already.
        """
        unexplained = batch.reached - batch.sums.names
        missing = [
            name
            for name, parameter in self.parameters.items()
            if name in unexplained
            and parameter.grad is not None
            and bool(parameter.grad.any())
        ]
        if missing:
            raise RuntimeError(
                "per-example gradients need parameters that are used by the modules "
                f"that hold them, got others for {missing}: freeze them with "
                "requires_grad_(False), or pass per_example=False."
            )


def _second_call() -> RuntimeError:
    return RuntimeError(
        "the model must be called once for each backward pass, got a second call: pass "
        "per_example=False for a loss of several forward passes."
    )


def field_of(output: Any, name: str, index: int) -> Tensor:
    """Return a model output's field: by name, or by place where it is a tuple."""
    return output[index] if isinstance(output, tuple) else output[name]
