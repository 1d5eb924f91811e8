"""How a model is called with a batch, and what it returns."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hf_sketch.examples.media import placeholders_of
from hf_sketch.examples.split import ExampleSplit, split_of

IGNORED: Final = -100  # the label of tokens that have no loss


@dataclass(frozen=True)
class ModelCall:
    """One call of a model.

    Args:
        args: positional arguments.
        kwargs: named arguments.
        inputs: the same by name.
        split: the examples in them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: Mapping[str, Any]
    split: ExampleSplit

    @classmethod
    def of(
        cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> "ModelCall":
        """Name a call's inputs and find its examples.

        Raises:
            ValueError: there is no tensor among the inputs.
        """
        inputs = kwargs
        if args and isinstance(args[0], Mapping):  # one dict of inputs
            inputs = {**args[0], **kwargs}
        elif args:
            names = list(inspect.signature(model.forward).parameters)
            inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        main = getattr(model, "main_input_name", "input_ids")
        split = split_of(inputs, main, placeholders_of(model))
        return cls(_copied(args), kwargs, inputs, split)

    def run(self, model: nn.Module) -> Any:
        """Return what the model gives."""
        return model(*_copied(self.args), **self.kwargs)

    def without_cache(self, model: nn.Module) -> "ModelCall":
        """Return the call without a cache of keys and values."""
        if "use_cache" not in inspect.signature(model.forward).parameters:
            return self
        kwargs = {**self.kwargs, "use_cache": False}
        return ModelCall(self.args, kwargs, self.inputs, self.split)

    @property
    def goes_on(self) -> bool:
        """Whether an input has a graph: another call, or the user, has made it."""
        given = tree_leaves((self.args, self.kwargs))
        return any(isinstance(x, Tensor) and x.requires_grad for x in given)

    def detached(self) -> "ModelCall":
        """Return the call with inputs that have no graph."""
        given = (self.args, self.kwargs, self.inputs)
        args, kwargs, inputs = tree_map(_detached, given)
        return ModelCall(args, kwargs, inputs, self.split)

    def without(self, name: str) -> "ModelCall":
        """Return the call without a named argument."""
        kwargs = {key: value for key, value in self.kwargs.items() if key != name}
        return ModelCall(self.args, kwargs, self.inputs, self.split)

    def part(self, first: int, count: int) -> "ModelCall":
        """Return the call with some of its examples; one alone has rows of its own."""

        def share(name: str, given: Any) -> Any:
            own = partial(self.split.share, name, first=first, count=count)
            return tree_map(own, given)

        def named(given: Mapping[str, Any]) -> dict[str, Any]:
            return {name: share(name, value) for name, value in given.items()}

        args = tuple(
            named(x) if isinstance(x, Mapping) else share("", x) for x in self.args
        )
        split = self.split.some(first, count)
        return ModelCall(args, named(self.kwargs), named(self.inputs), split)

    def without_padding(self, answers: Sequence[Tensor]) -> list[Tensor]:
        """Return answers with zeros where they are of padding, which has no loss.

        Without images, Qwen2-VL gives padding other positions.
        """
        mask = self.inputs.get("attention_mask")
        if not isinstance(mask, Tensor):
            return list(answers)
        return [
            x.where(mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim())) != 0, 0)
            if x.shape[: mask.dim()] == mask.shape
            else x
            for x in answers
        ]

    @property
    def situation(self) -> object:
        """What decides how modules are called, as far as the inputs tell.

        Also whether there is one row per example, of which several images have more.
        """
        size = self.split.size
        tensors = frozenset(
            (name, len(value) == size)
            for name, value in self.inputs.items()
            if isinstance(value, Tensor) and value.dim()
        )
        return self.split.kind, size > 1, tensors


def _copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return arguments with dicts copied: a model may put its results into them."""
    mappings = [{**x} if isinstance(x, Mapping) else x for x in args]
    return tuple(mappings)


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def field_of(output: Any, name: str, index: int) -> Tensor:
    """Return a model output's field: by name, or by place where it is a tuple."""
    return output[index] if isinstance(output, tuple) else output[name]


def known_loss(output: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Return the loss in a model's output.

    Raises:
        ValueError: there is none.
    """
    loss = loss_of(output)
    if loss is None:
        raise ValueError(
            f"the model must return a loss, got none for the inputs {[*inputs]}: add "
            "the column labels (for a causal language model a copy of input_ids), or "
            "pass loss_fn."
        )
    return loss


def next_labels(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return what the tokens of a causal model predict, (b, t - 1), if it is there."""
    if (shifted := inputs.get("shift_labels")) is not None:
        return shifted
    labels = inputs.get("labels")
    return labels[:, 1:] if isinstance(labels, Tensor) and labels.dim() > 1 else None


def loss_of(output: Any) -> Tensor | None:
    """Return the loss in a model's output, if there is one."""
    if isinstance(output, Tensor):
        loss = output
    elif isinstance(output, Mapping):
        loss = output.get("loss")
    else:
        loss = output[0] if isinstance(output, tuple) and output else None
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def penalty_of(model: nn.Module, output: Any) -> Tensor | None:
    """Return the term of a model's loss that no example owns: its routers' balance."""
    config = getattr(model, "config", None)
    if not isinstance(output, Mapping) or config is None:
        return None
    fields: Mapping[str, Any] = output
    penalty, text = fields.get("aux_loss"), config.get_text_config()
    factor = getattr(text, "router_aux_loss_coef", None)
    if factor is None or not isinstance(penalty, Tensor) or not penalty.requires_grad:
        return None
    return factor * penalty
