"""Losses that compare examples, found before their backward pass."""

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_sketch.examples.attempt import attempt
from hf_sketch.examples.batch import Batch
from hf_sketch.examples.calls import ModelCall
from hf_sketch.examples.comparison import check_comparison, comparison_error
from hf_sketch.examples.sketcher import ExampleSketcher

from .origins.finder import Origins
from .trainers import wrap_method

_CHECKED_BATCHES = 3
# Of sentence-transformers 6.2: what it picks depends on all pairs of the batch, but not
# continuously, so that derivatives do not tell.
_PICKING = ("OnlineContrastiveLoss",)
_CACHING = "Cached"  # contrastive losses there, which call the model after the loss


class LossCheck:
    """Refuses losses outside the model that compare examples.

    Looks at losses of several calls of the model, and at those of Trainers that hold a
    loss as a module, as sentence-transformers' do. It checks the first batches with
    each number of calls.

    Args:
        trainer: the one that trains.
        sketcher: reads the rows.

    Raises:
        RefusalError: the Trainer's loss is known to compare examples.
    """

    def __init__(self, trainer: Trainer, sketcher: ExampleSketcher) -> None:
        self._trainer, self._sketcher = trainer, sketcher
        named = sketcher.checks_losses and isinstance(self._loss, nn.Module)
        own = self._loss.modules() if named else ()
        for name in (type(module).__name__ for module in own):
            if name in _PICKING or name.startswith(_CACHING):
                raise comparison_error(name)
        self._left: dict[int, int] = {}  # batches to check, by their number of calls

    @contextmanager
    def watching(
        self,
        origins_of: Callable[[Sequence[ModelCall]], Origins | None],
        first: bool = False,
    ) -> Generator[None]:
        """Check a loss as the Trainer computes it within.

        Args:
            origins_of: finds whose the rows of the model's calls are, if it can.
            first: look for a term, too, that no example owns.
        """

        def compute(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = plain(*args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            if isinstance(loss, Tensor):
                items = kwargs.get("num_items_in_batch")
                self._sketcher.note_loss(loss, items, first)
            if isinstance(loss, Tensor) and self._sketcher.checks_losses:
                self._check(loss, origins_of)
            return result

        wanted = not self._left or any(self._left.values())
        self._sketcher.keeps_answers = self._sketcher.checks_losses and wanted
        undo = wrap_method(self._trainer, "compute_loss", compute)
        try:
            yield
        finally:
            undo()

    def _check(
        self,
        loss: Tensor,
        origins_of: Callable[[Sequence[ModelCall]], Origins | None],
    ) -> None:
        """Check the loss of a batch, and let go of the model's answers."""
        calls = self._sketcher.backward_pass.calls
        try:
            if self._left.setdefault(len(calls), self._batches(calls)):
                held = [call for call in calls if call.answers]
                found = None
                if held and loss.requires_grad:
                    found = origins_of([call.call for call in held])
                owners = [] if found is None else found.places
                self._compare(loss, held, owners)
                self._left[len(calls)] -= len(set(owners)) > 1
        finally:
            for call in calls:
                call.answers = []

    def _batches(self, calls: Sequence[Batch]) -> int:
        """Return how many batches with that number of calls to check."""
        several = len(calls) > 1 or isinstance(self._loss, nn.Module)
        return _CHECKED_BATCHES if several else 0

    def _compare(
        self, loss: Tensor, calls: Sequence[Batch], owners: Sequence[int | None]
    ) -> None:
        """Raise if the loss compares examples; warn if that cannot be known."""
        if len(set(owners)) < 2:
            return
        made = f"the loss of {type(self._trainer).__name__}.compute_loss"
        name = type(self._loss).__name__ if isinstance(self._loss, nn.Module) else made
        error: str | None
        try:
            with self._sketcher.backward_pass.muted(), attempt() as tried:
                check_comparison(loss, calls, owners, name)
            error = tried.error
        except (MemoryError, torch.OutOfMemoryError) as failure:
            error = f"out of memory ({failure})"
        if error is not None:
            warnings.warn(
                f"It is not known whether {name} compares examples: {error}. If it "
                "does, a row is the gradient of its example's share.",
                stacklevel=2,
            )

    @property
    def _loss(self) -> Any:
        """The Trainer's own loss, if it holds one."""
        return getattr(self._trainer, "loss", None)
