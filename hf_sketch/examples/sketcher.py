"""Per-example gradient sketches out of one ordinary backward pass."""

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from hf_sketch.examples.hooks import Batch, watched_modules
from hf_sketch.examples.losses import (
    ExampleLosses,
    check_reduction,
    example_losses,
    is_causal,
)
from hf_sketch.examples.position_biases import PositionBiases
from hf_sketch.examples.split import ExampleSplit
from hf_sketch.examples.sums import GradientSums
from hf_sketch.model.fsdp import in_row_shards
from hf_sketch.model.sketch import ModelSketch

ExampleLossFunction = Callable[[Any, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class ExampleBatch:
    """A batch, with the sketched gradients of its examples.

    Args:
        examples: how the batch divides into examples.
        inputs: what the model was called with.
        rows: (b, out_size), row i the sketch of the gradient of losses[i].
        losses: (b,), each example's own loss; NaN where the loss is computed outside of
            the model, and a row is b times the gradient of the example's share of it.
        weights: (b,), the weight with which each example entered the gradient: the sum
            of weights[i] * rows[i] is the sketch of the batch's gradient.
    """

    examples: ExampleSplit
    inputs: Mapping[str, Any]
    rows: Tensor
    losses: Tensor
    weights: Tensor


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
        self._biases = PositionBiases.of_model(model, self.parameters)
        self._watched = [
            watched
            for watched in watched_modules(model, self.parameters)
            if not self._biases.covers(watched.module)
        ]
        self._batch_norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self._handles: list[Any] = []
        self._batch: Batch | None = None
        self._losses: ExampleLosses | None = None
        self._scale: Tensor | None = None
        self._outputs: list[Tensor] | None = None
        self._reached: set[str] = set()

    def __enter__(self) -> "ExampleSketcher":
        self._handles = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True),
        ]
        for watched in self._watched:
            self._handles += watched.register(self._current)
        self._handles += self._biases.register(self._current)
        if in_row_shards(self.parameters.values()):
            return self  # a process hears of gradients of parameters it did not use
        for name, parameter in self.parameters.items():
            hook = self._noting(name)
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._batch = None

    def take(self, loss_scale: float = 1.0) -> ExampleBatch:
        """The rows of the batch whose backward pass has just run.

        Args:
            loss_scale: what the loss was multiplied by before the backward pass, as a
                GradScaler does; the weights are without it.

        Raises:
            RuntimeError: no forward and backward pass ran since the last call, or a
                parameter has a gradient that no module's call explains.
            MemoryError: the memory ran out while gradients were read.
        """
        batch, self._batch = self._batch, None
        losses, scale = self._losses, self._scale
        self._losses = self._scale = None
        if batch is None or (losses is not None and scale is None):
            raise RuntimeError(
                "a forward and a backward pass must come before each take(), got none: "
                "call loss.backward() on the model's loss."
            )
        batch.finish()
        self._biases.clear()
        self._check_names(batch)
        rows = batch.sums.rows()
        if losses is None or scale is None:
            size = batch.split.size
            shares = torch.full((size,), 1 / size, dtype=rows.dtype, device=rows.device)
            rows = rows * (size / loss_scale)
            none = shares * torch.nan
            return ExampleBatch(batch.split, batch.inputs, rows, none, shares)
        weights = losses.weights * scale.to(losses.weights)
        scaled = rows / weights.to(rows).unsqueeze(1)
        rows = torch.where(weights.unsqueeze(1) == 0, rows, scaled)
        return ExampleBatch(
            batch.split, batch.inputs, rows, losses.losses, weights / loss_scale
        )

    def sketch(
        self,
        inputs: Mapping[str, Any],
        loss_fn: ExampleLossFunction | None = None,
    ) -> ExampleBatch:
        """Run the model on a batch and sketch its examples' gradients.

        No parameter's `.grad` is computed or touched.

        Args:
            inputs: what the model is called with.
            loss_fn: of (the model's output, inputs), each example's own loss (b,); by
                default the model's loss.
        """
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            inputs = {**inputs, "use_cache": False}
        outputs = self._outputs = list[Tensor]()
        with torch.enable_grad():
            output = self.model(**inputs)
            self._outputs = None
            losses = None if loss_fn is None else loss_fn(output, inputs)
        if self._batch is None:
            raise RuntimeError(
                "`sketch` reads through hooks, got none: call it inside "
                "`with ExampleSketcher(...)`."
            )
        if losses is not None:
            ones = torch.ones_like(losses)
            self._losses = ExampleLosses(losses.detach(), ones)
            self._scale = ones.sum() / ones.sum()
        total = field_of(output, "loss", 0) if losses is None else losses.sum()
        torch.autograd.grad(total, outputs, allow_unused=True)
        outputs.clear()  # their hooks hold the batch, and the batch holds them
        return self.take()

    def split_of(self, inputs: Mapping[str, Any]) -> ExampleSplit:
        """The examples of a batch that the model is called with."""
        return ExampleSplit.of_inputs(inputs, self.main_input)

    @property
    def main_input(self) -> str:
        """The name of the model's first input."""
        return getattr(self.model, "main_input_name", "input_ids")

    @contextmanager
    def paused(self) -> Generator[None]:
        """Record nothing within."""
        recording, self.recording = self.recording, False
        yield
        self.recording = recording

    @contextmanager
    def own_units(self) -> Generator[None]:
        """Record within, with the mean over an example's tokens as its loss."""
        before = self.recording, self.loss
        self.recording, self.loss = True, "mean"
        yield
        self.recording, self.loss = before

    def _current(self) -> Batch | None:
        """The batch that is recorded, if any."""
        return self._batch

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Start a batch."""
        if not (self.recording and torch.is_grad_enabled()):
            return
        if self._batch is not None:
            self._batch = None
            raise RuntimeError(
                "the model must be called once for each backward pass, got a second "
                "call: pass per_example=False for a loss of several forward passes."
            )
        self._check_independence()
        self._reached.clear()
        split = self.split_of(kwargs)
        sums = GradientSums(self.model_sketch, self.parameters, split.size)
        self._batch = Batch(kwargs, split, sums, self._outputs)

    def _after(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Split the loss, and watch the scale with which it enters the backward."""
        batch, labels = self._batch, kwargs.get("labels")
        if batch is None or labels is None or not torch.is_grad_enabled():
            return
        loss = field_of(output, "loss", 0)
        with batch.holding_failures():
            self._losses = example_losses(
                loss.detach(),
                field_of(output, "logits", 1),
                labels,
                getattr(getattr(module, "config", None), "problem_type", None),
                reduction=self.loss,
                items_in_batch=kwargs.get("num_items_in_batch"),
                causal=is_causal(module),
                split=batch.split,
            )

        def keep_scale(gradient: Tensor) -> None:
            self._scale = gradient.detach().clone()

        loss.register_hook(keep_scale)

    def _check_independence(self) -> None:
        """Raise if examples see each other."""
        for module in self._batch_norms:
            if module.training:
                raise ValueError(
                    "per-example gradients need examples that do not see each other, "
                    f"got {type(module).__name__} in training mode: call .eval() on it,"
                    " replace it by GroupNorm, or pass per_example=False."
                )

    def _noting(self, name: str) -> Callable[[Tensor], None]:
        """A hook that notes that a backward pass came to a parameter."""
        return lambda _: self._reached.add(name)

    def _check_names(self, batch: Batch) -> None:
        """Raise if the batch gave a parameter a gradient, and no contributions.

        Gradients of other micro-batches, and under DDP of other processes, may be there
        already.
        """
        unexplained = self._reached - batch.sums.names
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


def field_of(output: Any, name: str, index: int) -> Tensor:
    """A model output's field: by name, or by place where it is a tuple."""
    return output[index] if isinstance(output, tuple) else output[name]
