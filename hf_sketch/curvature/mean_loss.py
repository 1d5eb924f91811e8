"""A model's mean loss over a fixed list of batches, and sums of its derivatives."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from hf_sketch.examples.losses import example_losses, is_causal
from hf_sketch.examples.sketcher import field_of
from hf_sketch.examples.split import ExampleSplit
from hf_sketch.model.fsdp import check_whole
from hf_sketch.model.names import named_parameters
from hf_sketch.model.state import evaluation_mode, kept_random_state, random_state

UNITS = ("tokens", "examples")

_ITEMS = "num_items_in_batch"
_IGNORED = -100

LossFunction = Callable[[Any, Mapping[str, Any]], Tensor]
Part = TypeVar("Part", Tensor, list[Tensor])


@dataclass(frozen=True)
class CurvatureBatch:
    """A batch and what it counts for.

    Args:
        inputs: of the model.
        items: the tokens or examples that its loss is the mean over.
    """

    inputs: Mapping[str, Any]
    items: int


class MeanLoss:
    """The mean of a model's loss over all tokens, or all examples, of some batches.

    Args:
        model: called with a batch's named tensors.
        batches: inputs of the model, with labels.
        loss_fn: of (the model's output, its inputs), the batch's mean loss, a scalar;
            by default the model's own loss.
        unit: "tokens": every token with a label counts the same, in whatever batch it
            is; "examples": every example does, by the mean over its own tokens.

    Raises:
        ValueError: there is no batch, nothing trains, parameters are in shards, or the
            unit is unknown; on first use, a loss that is no scalar or not finite, or
            whose tokens cannot be counted.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Mapping[str, Any]],
        loss_fn: LossFunction | None = None,
        unit: str = "tokens",
    ) -> None:
        if not batches:
            raise ValueError(
                "curvature needs at least one batch, got an empty list: pass the inputs"
                " of the model, with labels."
            )
        if unit not in UNITS:
            raise ValueError(f"unit must be one of {UNITS}, got {unit!r}.")
        self.model = model
        self.loss_fn = loss_fn
        self.unit = unit
        self.parameters = {
            n: p for n, p in named_parameters(model).items() if p.requires_grad
        }
        if not self.parameters:
            raise ValueError(
                "curvature needs at least one trainable parameter, got none: call "
                "requires_grad_(True) on those that train."
            )
        check_whole("curvature", self.parameters.values())
        # The Trainer's count is of other batches too; ours are weighted here.
        self._given = [
            {name: value for name, value in batch.items() if name != _ITEMS}
            for batch in batches
        ]
        self._counted: list[CurvatureBatch] = []

    @property
    def batches(self) -> Sequence[CurvatureBatch]:
        """The batches that are run: the given ones, or parts of them."""
        check_items(self.items)
        return self._counted

    @property
    def items(self) -> int:
        """The tokens or examples that the mean is over; 0 if no token has a label."""
        if not self._counted:
            with evaluation_mode(self.model), torch.no_grad():
                self._counted = [
                    part for inputs in self._given for part in self._count(inputs)
                ]
        return sum(batch.items for batch in self._counted)

    def run(self, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
        """The model's output and loss on a batch.

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
                f"curvature needs a loss that is one number, got {tuple(loss.shape)}: "
                "return the batch's mean from loss_fn."
            )
        if not loss.isfinite().all():
            raise ValueError(
                f"curvature needs a finite loss, got {float(loss.detach())}: look for "
                "the batch or the step that made it so."
            )
        return output, loss.reshape(())

    def sum(self, part_of: Callable[[Mapping[str, Any], float], Part]) -> Part:
        """Add up what a function gives for each batch and its share of the mean.

        A batch that does not fit the memory is halved, for good. The random numbers are
        the same each time.

        Raises:
            MemoryError: a single example does not fit.
        """
        device = next(iter(self.parameters.values())).device
        with kept_random_state(random_state(device), device):
            return self._sum(part_of)

    def _sum(self, part_of: Callable[[Mapping[str, Any], float], Part]) -> Part:
        total: Part | None = None
        place = 0
        while place < len(self.batches):
            batch = self.batches[place]
            try:
                part = part_of(batch.inputs, batch.items / self.items)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                part = None
            if part is None:
                self._counted[place : place + 1] = self._halves(batch.inputs)
                continue
            total = part if total is None else _added(total, part)
            place += 1
        assert total is not None
        return total

    def examples(self) -> Iterator[Mapping[str, Any]]:
        """Each example as a batch of its own; those without any label are left out."""
        for inputs in self._given:
            for alone in self._split(inputs).pieces(inputs, 1):
                if self._labelled(alone.get("labels")) != 0:
                    yield alone

    def _count(self, inputs: Mapping[str, Any]) -> list[CurvatureBatch]:
        """A batch with its number of items, in halves if it does not fit the memory."""
        try:
            return self._items_of(inputs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return self._halves(inputs)

    def _items_of(self, inputs: Mapping[str, Any]) -> list[CurvatureBatch]:
        """A batch with its number of items; its examples if they are to count alike."""
        labels, split = inputs.get("labels"), self._split(inputs)
        labelled = self._labelled(labels)
        if labelled == 0:
            return []
        output, loss = self.run(inputs)
        if self.loss_fn is not None or not isinstance(labels, Tensor):
            items = labelled if self.unit == "tokens" else None
            return [CurvatureBatch(inputs, split.size if items is None else items)]
        weights = self._weights(output, loss, inputs, split)
        if self.unit == "tokens":
            return [CurvatureBatch(inputs, round(1 / float(weights.max())))]
        if bool((weights == weights.max()).all()):
            return [CurvatureBatch(inputs, split.size)]
        alone = split.pieces(inputs, 1)
        return [part for example in alone for part in self._count(example)]

    def _labelled(self, labels: Any) -> int | None:
        """How many tokens have a label; None if labels are not of tokens."""
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
        """The weight of an example's loss in the batch's: one item's, with "tokens"."""
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
                f"the model's loss must be a mean over {self.unit}, so that batches can"
                f" be weighted; {error} Or pass loss_fn=lambda output, inputs: "
                "output.loss, to weight batches by the labels that are not -100."
            ) from error

    def _halves(self, inputs: Mapping[str, Any]) -> list[CurvatureBatch]:
        """The batch's examples in two batches, or in more."""
        split = self._split(inputs)
        if split.size == 1 or split.starts:
            raise MemoryError(
                "curvature needs memory for one example at a time, which ran out with "
                f"{split.size} in a packed batch or alone: pass shorter examples, or "
                'mode="finite_difference", which needs less.'
            )
        clear_device_cache(garbage_collection=True)
        halves = split.pieces(inputs, -(-split.size // 2))
        with evaluation_mode(self.model), torch.no_grad():
            return [part for half in halves for part in self._count(half)]

    def _split(self, inputs: Mapping[str, Any]) -> ExampleSplit:
        main_input = getattr(self.model, "main_input_name", "input_ids")
        return ExampleSplit.of_inputs(inputs, main_input)


def check_items(items: int) -> None:
    """Raise unless there is something that a mean loss can be over."""
    if not items:
        raise ValueError(
            "curvature needs a loss on at least one token, got labels that are all "
            "-100: pass other batches."
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a processor or an accelerator."""
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        text in str(error) for text in texts
    )


def _added(total: Any, part: Any) -> Any:
    """The sum, in place."""
    if isinstance(total, Tensor):
        return total.add_(part)
    for held, more in zip(total, part, strict=True):
        held.add_(more)
    return total
