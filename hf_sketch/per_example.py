"""Per-example gradient sketches out of one ordinary backward pass."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_sketch.example_losses import ExampleLosses, example_losses
from hf_sketch.gradient_rules import Rule, rule_for
from hf_sketch.model_sketch import ModelSketch
from hf_sketch.sketches.operator import accumulation_dtype
from hf_sketch.sketches.outer import form_outer


@dataclass(frozen=True)
class ExampleRows:
    """Sketched gradients of the examples of one batch.

    Args:
        rows: (b, out_size), row i the sketch of the gradient of losses[i].
        losses: (b,), each example's own loss.
        weights: (b,), the weight with which each example entered the gradient: the sum
            of weights[i] * rows[i] is the sketch of the batch's gradient.
    """

    rows: Tensor
    losses: Tensor
    weights: Tensor


@dataclass
class _Batch:
    """What is known of the batch between its forward pass and `take`."""

    size: int
    rows: Tensor | None = None
    formed: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    losses: ExampleLosses | None = None
    scale: Tensor | None = None
    outputs: list[Tensor] = field(default_factory=list[Tensor])


class PerExampleSketcher:
    """Sketches each example's gradient while a backward pass runs.

    Used as a context manager: inside it, modules with trainable parameters carry hooks
    that read their input and their output's gradient. While `recording` is true, each
    forward and backward pass of the model is followed by one `take`. Neither the loss
    nor any gradient nor any random number changes.

    Args:
        model: a sequence classification model called with keyword arguments, `labels`
            among them.
        model_sketch: the map; its parameters must be the model's trainable ones.

    Raises:
        ValueError: the sketch is of another model, or a trainable parameter belongs to
            a module that has no rule; the message names it.
    """

    def __init__(self, model: nn.Module, model_sketch: ModelSketch) -> None:
        self.model = model
        self.model_sketch = model_sketch
        self.recording = True
        parameters = model_sketch.parameters_of(model)
        self._watched = _watched_modules(model, parameters)
        self._dtype = accumulation_dtype(next(iter(parameters.values())).dtype)
        self._handles: list[RemovableHandle] = []
        self._batch: _Batch | None = None
        self._keep_outputs = False

    def __enter__(self) -> "PerExampleSketcher":
        self._handles = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True),
        ]
        for watched in self._watched:
            hook = partial(self._after_module, watched)
            handle = watched.module.register_forward_hook(hook, with_kwargs=True)
            self._handles.append(handle)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._batch = None

    def take(self) -> ExampleRows:
        """The rows of the batch whose backward pass has just run.

        Raises:
            RuntimeError: no forward and backward pass ran since the last call.
        """
        batch, self._batch = self._batch, None
        if batch is None or batch.losses is None or batch.scale is None:
            raise RuntimeError(
                "a forward and a backward pass of the model's own loss must come before"
                " each take(), got none: call loss.backward() on the loss that the "
                "model returns (a Trainer with compute_loss_func or label smoothing "
                "does not: pass per_example=False)."
            )
        rows = self._total(batch)
        weights = batch.losses.weights * batch.scale.to(batch.losses.weights)
        scaled = rows / weights.to(rows).unsqueeze(1)
        rows = torch.where(weights.unsqueeze(1) == 0, rows, scaled)
        return ExampleRows(rows, batch.losses.losses, weights)

    def sketch(self, inputs: Mapping[str, Any]) -> ExampleRows:
        """Run the model on a batch and sketch its examples' gradients.

        No parameter's `.grad` is computed or touched.
        """
        self._keep_outputs = True
        with torch.enable_grad():
            output = self.model(**inputs)
        self._keep_outputs = False
        if self._batch is None:
            raise RuntimeError(
                "`sketch` reads through hooks, got none: call it inside "
                "`with PerExampleSketcher(...)`."
            )
        outputs, self._batch.outputs = self._batch.outputs, []
        torch.autograd.grad(_field(output, "loss", 0), outputs, allow_unused=True)
        return self.take()

    def _total(self, batch: _Batch) -> Tensor:
        """The sketches of all contributions to a batch's gradients, summed."""
        parts = [] if batch.rows is None else [batch.rows]
        if batch.formed:
            parts.append(self.model_sketch.sketch_rows(batch.formed))
        zeros = torch.zeros(batch.size, self.model_sketch.out_size)
        return sum(parts[1:], start=parts[0]) if parts else zeros

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
        labels = kwargs.get("labels")
        if labels is None:
            raise ValueError(
                "per-example gradients need the model to be called with labels=..., got"
                f" {sorted(kwargs)}: name the label column 'label' or 'labels', and "
                "leave label smoothing and compute_loss_func off, or pass "
                "per_example=False."
            )
        self._batch = _Batch(len(labels))

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
        loss, logits = _field(output, "loss", 0), _field(output, "logits", 1)
        kind = getattr(getattr(module, "config", None), "problem_type", None)
        batch.losses = example_losses(loss, logits, kwargs["labels"], kind)

        def keep_scale(gradient: Tensor) -> None:
            batch.scale = gradient.detach().clone()

        loss.register_hook(keep_scale)

    def _after_module(
        self,
        watched: "_Watched",
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor | None:
        """Watch a module's output gradient; give every example its own output first."""
        batch = self._batch
        if batch is None or not output.requires_grad:
            return None
        inputs: Tensor = (args or tuple(kwargs.values()))[0].detach()
        shared = output.shape[0] == 1 and batch.size > 1
        if shared:  # position embeddings: one row that broadcasts over the batch
            output = output.expand(batch.size, *output.shape[1:])
            inputs = inputs.expand(batch.size, *inputs.shape[1:])
        if output.shape[0] != batch.size:
            raise ValueError(
                f"the first dimension of every output must be the batch's {batch.size},"
                f" got {tuple(output.shape)} from {type(module).__name__} at "
                f"{watched.path!r}: pass per_example=False."
            )
        if self._keep_outputs:
            batch.outputs.append(output)

        def add_rows(gradient: Tensor) -> None:
            with torch.no_grad():
                self._add(batch, watched, inputs, gradient)

        output.register_hook(add_rows)
        return output if shared else None

    def _add(
        self, batch: _Batch, watched: "_Watched", inputs: Tensor, gradient: Tensor
    ) -> None:
        """Add the sketch of the module's per-example gradients to the batch's rows."""
        if inputs.is_floating_point():
            inputs = inputs.to(self._dtype)
        gradient = gradient.to(self._dtype)
        for part in watched.rule(watched.module, inputs, gradient):
            name = watched.names.get(part.attribute)
            if name is None:
                continue
            operator = self.model_sketch.operators.get(name)
            if operator is not None and part.right is not None:
                rows = operator.apply_outer(part.left, part.right)
                batch.rows = rows if batch.rows is None else batch.rows.add_(rows)
                continue
            formed = part.left
            if part.right is not None:
                size = watched.module.get_parameter(part.attribute).numel()
                formed = form_outer(part.left, part.right, 0, size)
            earlier = batch.formed.get(name)
            batch.formed[name] = formed if earlier is None else earlier + formed


@dataclass(frozen=True)
class _Watched:
    """A module with trainable parameters of its own."""

    module: nn.Module
    path: str
    rule: Rule
    names: dict[str, str]  # attribute -> parameter's name in the sketch


def _watched_modules(
    model: nn.Module, parameters: Mapping[str, Tensor]
) -> list[_Watched]:
    """Every module that owns a trainable parameter, with its rule."""
    known = {id(parameter): name for name, parameter in parameters.items()}
    watched: list[_Watched] = []
    uncovered: list[str] = []
    for path, module in model.named_modules():
        names = {
            attribute: known[id(parameter)]
            for attribute, parameter in module.named_parameters(recurse=False)
            if id(parameter) in known
        }
        rule = rule_for(module)
        if names and rule is None:
            uncovered.append(f"{type(module).__name__} at {path or 'the top'!r}")
        elif names and rule is not None:
            watched.append(_Watched(module, path, rule, names))
    if uncovered:
        raise ValueError(
            "per-example gradients cover Linear, Embedding and LayerNorm, got trainable"
            f" parameters in {', '.join(uncovered)}: freeze them with "
            "requires_grad_(False), or pass per_example=False."
        )
    return watched


def _field(output: Any, name: str, index: int) -> Tensor:
    """A model output's field: by name, or by place where it is a tuple."""
    return output[index] if isinstance(output, tuple) else output[name]
