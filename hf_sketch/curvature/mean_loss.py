"""A model's mean loss over a fixed list of batches, and sums of its derivatives."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Literal, TypeVar, get_args

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from hf_sketch.curvature.vectors import Parts
from hf_sketch.examples.calls import field_of
from hf_sketch.examples.losses import example_losses, is_causal
from hf_sketch.examples.split import ExampleSplit, Packed, split_of
from hf_sketch.model.fsdp import check_whole
from hf_sketch.model.names import named_parameters
from hf_sketch.model.state import evaluation_mode, kept_random_state, random_state
from hf_sketch.sketches.choices import check_choice

Unit = Literal["tokens", "examples"]
# A batch's inputs, and how many tokens or examples its loss is the mean over.
Counted = tuple[Mapping[str, Any], int]
LossFunction = Callable[[Any, Mapping[str, Any]], Tensor]
Value = TypeVar("Value")

_ITEMS = "num_items_in_batch"
_IGNORED = -100


class MeanLoss:
    """The mean of a model's loss over all tokens, or all examples, of some batches.

    See `CurvatureOperator` for the arguments.

    Raises:
        ValueError: there is no batch, nothing trains, or parameters are in shards; on
            first use, a loss that is no finite scalar, or whose tokens cannot be
            counted.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        loss_fn: LossFunction | None = None,
        unit: Unit = "tokens",
    ) -> None:
        check_choice("unit", unit, get_args(Unit))
        if not batches:
            raise ValueError(
                "Curvature needs at least one batch, got an empty list. Pass inputs of "
                "the model, with labels."
            )
        self.model = model
        self.loss_fn = loss_fn
        self.unit = unit
        self.parameters = {
            n: p for n, p in named_parameters(model).items() if p.requires_grad
        }
        if not self.parameters:
            raise ValueError(
                "Curvature needs at least one trainable parameter, got none. Call "
                "requires_grad_(True) on those that train."
            )
        check_whole("curvature", self.parameters.values())
        # The Trainer counts the tokens of a whole step; ours are counted here.
        self._given = [
            {name: value for name, value in batch.items() if name != _ITEMS}
            for batch in batches
        ]

    @property
    def items(self) -> int:
        """The tokens or examples that the mean is over; 0 if no token has a label."""
        return sum(items for _, items in self._counted)

    def run(self, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """Return the model's output and loss on a batch.

        Raises:
            ValueError: the loss is no scalar, or not finite.
        """
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            inputs = {**inputs, "use_cache": False}
        output = self.model(**inputs)
        if self.loss_fn is None:
            loss = field_of(output, "loss", 0)
        else:
            loss = self.loss_fn(output, inputs)
        if loss.numel() != 1:
            raise ValueError(
                f"Curvature needs a loss that is one number, got {tuple(loss.shape)}. "
                "Return the batch's mean from loss_fn."
            )
        if not loss.isfinite().all():
            raise ValueError(
                f"Curvature needs a finite loss, got {float(loss.detach())}. Look for "
                "the batch or the step that caused it."
            )
        return output, loss.reshape(())

    def sum(self, parts_of: Callable[[Mapping[str, Any], float], Parts]) -> Parts:
        """Add up what a function returns for each batch and its share of the mean.

        A batch that does not fit into memory is halved, for good. The random numbers
        are the same each time.

        Raises:
            MemoryError: a single example does not fit.
        """
        check_items(self.items)
        device = next(iter(self.parameters.values())).device
        total: Parts = []
        place = 0
        with kept_random_state(random_state(device), device):
            while place < len(self._counted):
                inputs, items = self._counted[place]
                share = items / self.items
                parts = _unless_out_of_memory(partial(parts_of, inputs, share))
                if parts is None:
                    self._counted[place : place + 1] = self._halves(inputs)
                    continue
                if place == 0:
                    total = parts
                else:
                    for held, more in zip(total, parts, strict=True):
                        held.add_(more)
                place += 1
        return total

    def examples(self) -> Iterator[Mapping[str, Any]]:
        """Yield each example with a label as a batch of its own."""
        for inputs in self._given:
            for alone in self._split(inputs).pieces(inputs, 1):
                if self._labelled(alone.get("labels")) != 0:
                    yield alone

    @cached_property
    def _counted(self) -> list[Counted]:
        """The batches that are run: the given ones, or parts of them."""
        return [part for inputs in self._given for part in self._count(inputs)]

    def _count(self, inputs: Mapping[str, Any]) -> list[Counted]:
        """Count a batch's items; halve it if it does not fit into memory."""
        with evaluation_mode(self.model), torch.no_grad():
            counted = _unless_out_of_memory(partial(self._items_of, inputs))
        return self._halves(inputs) if counted is None else counted

    def _items_of(self, inputs: Mapping[str, Any]) -> list[Counted]:
        """Count a batch's items; split it where examples count alike but weigh not."""
        labels, split = inputs.get("labels"), self._split(inputs)
        labelled = self._labelled(labels)
        if labelled == 0:
            return []
        output, loss = self.run(inputs)
        if self.loss_fn is not None or not isinstance(labels, Tensor):
            items = labelled if self.unit == "tokens" else None
            return [(inputs, items or split.size)]
        weights = self._weights(output, loss, inputs, split)
        if self.unit == "tokens":
            return [(inputs, round(1 / float(weights.max())))]
        if bool((weights == weights.max()).all()):
            return [(inputs, split.size)]
        alone = split.pieces(inputs, 1)
        return [part for example in alone for part in self._count(example)]

    def _labelled(self, labels: Any) -> int | None:
        """Return how many tokens have a label; None if labels are not per token."""
        if not isinstance(labels, Tensor) or labels.dim() < 2:
            return None
        if labels.is_floating_point():
            return None
        if self.loss_fn is None and is_causal(self.model):
            labels = labels[:, 1:]
        return int((labels != _IGNORED).sum())

    def _weights(
        self, output: Any, loss: Tensor, inputs: Mapping[str, Any], split: ExampleSplit
    ) -> Tensor:
        """Return each example's weight in the batch's loss; per token with "tokens"."""
        config = getattr(self.model, "config", None)
        try:
            return example_losses(
                loss,
                field_of(output, "logits", 1),
                inputs["labels"],
                getattr(config, "problem_type", None),
                reduction="sum" if self.unit == "tokens" else "mean",
                causal=is_causal(self.model),
                split=split,
            ).weights
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"The model's loss must be a mean over {self.unit}, so that batches can"
                f" be weighted: {error} Or pass loss_fn=lambda output, inputs: "
                "output.loss to weight batches by the labels other than -100."
            ) from error

    def _halves(self, inputs: Mapping[str, Any]) -> list[Counted]:
        """Put the batch's examples into two batches, or more."""
        split = self._split(inputs)
        if split.size == 1 or isinstance(split, Packed):
            raise MemoryError(
                f"Memory ran out with {split.size} examples that cannot be split "
                'further. Pass shorter examples, or mode="finite_difference", which '
                "needs less memory."
            )
        clear_device_cache(garbage_collection=True)
        halves = split.pieces(inputs, -(-split.size // 2))
        return [part for half in halves for part in self._count(half)]

    def _split(self, inputs: Mapping[str, Any]) -> ExampleSplit:
        main_input = getattr(self.model, "main_input_name", "input_ids")
        return split_of(inputs, main_input)


def check_items(items: int) -> None:
    """Raise unless there is something to take the mean over."""
    if not items:
        raise ValueError(
            "Curvature needs a loss on at least one token, but all labels are -100. "
            "Pass other batches."
        )


def _unless_out_of_memory(compute: Callable[[], Value]) -> Value | None:
    """Return what a function computes; None if it ran out of memory on any device."""
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        texts = ("out of memory", "can't allocate memory", "not enough memory")
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not any(text in str(error) for text in texts):
            raise
        return None
