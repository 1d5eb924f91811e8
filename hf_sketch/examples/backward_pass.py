"""The calls of a model whose gradients one backward pass brings."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from hf_sketch.examples.batch import Batch, ExampleBatch
from hf_sketch.examples.calls import ModelCall


class BackwardPass:
    """The calls of a model that one backward pass goes through, often a single one.

    A loss may be made of several: of the two texts of a pair, of the chosen and the
    rejected answer, of one batch twice.
    """

    def __init__(self) -> None:
        self.calls: list[Batch] = []

    def begin_call(self) -> None:
        """Forget calls that an error has interrupted.

        Raises:
            RuntimeError: a backward pass has run, whose rows were not taken.
        """
        if any(call.phase == "done" for call in self.calls):
            self.calls = []
            raise late_call()
        self.calls = [call for call in self.calls if call.phase == "loss"]

    @contextmanager
    def muted(self, but: Batch | None = None) -> Generator[None]:
        """Within, read nothing of gradients that arrive: they are not training's."""
        for call in self.calls:
            call.muted = call is not but
        try:
            yield
        finally:
            for call in self.calls:
                call.muted = False

    def take(self, parameters: Mapping[str, Tensor], loss_scale: float) -> ExampleBatch:
        """Return the rows of all calls, and forget them.

        Args:
            parameters: what is trained, by name.
            loss_scale: what the loss was multiplied by before the backward pass.

        Raises:
            RuntimeError: the passes have not run, or a parameter has a gradient that no
                module's call explains.
            MemoryError: memory ran out while gradients were read.
        """
        calls, self.calls = self.calls, []
        # The loss need not come of each call.
        calls = [call for call in calls if call.phase != "loss"] or calls
        if not calls or not all(call.is_complete for call in calls):
            raise RuntimeError(
                "a forward and a backward pass must come before each take(): call "
                "loss.backward() on the model's loss."
            )
        gradients = [call.gradients() for call in calls]
        if all(call.has_own_losses for call in calls):
            taken = _own(calls, gradients, loss_scale)
            flags = [x for call in calls if (x := call.is_known) is not None]
            if flags:
                known = torch.stack(flags).all()
                taken = _either(known, taken, _shares(calls, gradients, loss_scale))
        else:
            taken = _shares(calls, gradients, loss_scale)
        _check_explained(calls, parameters)
        return taken


def late_call() -> RuntimeError:
    """Return the error of a model that is called after the backward pass, or within."""
    return RuntimeError(
        "All calls of the model must come before one backward pass, but the model was "
        "called again after it, or called itself. Losses that cache gradients do so: "
        "train with another, or pass per_example=False."
    )


def _own(
    calls: Sequence[Batch], gradients: Sequence[Tensor], loss_scale: float
) -> ExampleBatch:
    """Return rows of the examples' own losses, which the model computed."""
    each: list[tuple[Tensor, Tensor, Tensor]] = []
    for call, rows in zip(calls, gradients, strict=True):
        assert call.losses is not None
        assert call.scale is not None
        own = call.losses
        weights = own.weights * call.scale.to(own.weights)
        read = own.weights if call.apart else weights
        scaled = rows / read.to(rows).unsqueeze(1)
        rows = torch.where(weights.unsqueeze(1) == 0, rows, scaled)
        each.append((rows, own.losses, weights / loss_scale))
    rows, losses, weights = map(torch.cat, zip(*each, strict=True))
    unowned = any(call.apart or call.penalised for call in calls)
    return ExampleBatch(_model_calls(calls), rows, losses, weights, unowned)


def _either(known: Tensor, own: ExampleBatch, shares: ExampleBatch) -> ExampleBatch:
    """Return the first if it is known that losses are the examples' own."""
    return replace(
        own,
        rows=own.rows.where(known, shares.rows),
        losses=own.losses.where(known, torch.nan),
        weights=own.weights.where(known, shares.weights.to(own.weights)),
    )


def _shares(
    calls: Sequence[Batch], gradients: Sequence[Tensor], loss_scale: float
) -> ExampleBatch:
    """Return rows of each example's share of a loss that is not known."""
    each: list[Tensor] = []
    for call, rows in zip(calls, gradients, strict=True):
        scale = call.scale
        each.append(rows * scale if call.apart and scale is not None else rows)
    rows = torch.cat(each)
    weights = rows.new_full((len(rows),), 1 / len(rows))
    rows = rows * (len(rows) / loss_scale)
    return ExampleBatch(_model_calls(calls), rows, weights * torch.nan, weights)


def _model_calls(calls: Sequence[Batch]) -> tuple[ModelCall, ...]:
    return tuple(call.call for call in calls)


def _check_explained(calls: Sequence[Batch], parameters: Mapping[str, Tensor]) -> None:
    """Raise if the calls gave a parameter a gradient, and no contributions.

    Gradients of other micro-batches, and under DDP of other processes, may be there
    already.
    """
    reached = set[str]().union(*(call.reached for call in calls))
    explained = set[str]().union(*(call.sums.names for call in calls))
    missing = [
        name
        for name in parameters
        if name in reached - explained
        and (gradient := parameters[name].grad) is not None
        and bool(gradient.any())
    ]
    if missing:
        raise RuntimeError(
            "per-example gradients need parameters that are used by the modules "
            f"that hold them, got others for {missing}: freeze them with "
            "requires_grad_(False), or pass per_example=False."
        )
