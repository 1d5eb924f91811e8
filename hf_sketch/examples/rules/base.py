"""What every gradient rule has in common."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_sketch.examples.named_sums import Sums
from hf_sketch.examples.rules.shared_inputs import SharedInputs
from hf_sketch.examples.split import ExampleSplit
from hf_sketch.sketches.operator import accumulation_dtype
from hf_sketch.sketches.outer import Routed, Side
from hf_sketch.sketches.transforms.lazy import reads_freely

# A parameter's attribute in its module, and its per-example gradients. Without the
# last, row i of the first tensor (b, elements) is example i's gradient. With a tensor,
# sum_t left[i, t] (x) right[i, t] is, and integer left (b, t) stands for one-hot
# vectors. A `Side` came folded. With `Routed`, each product is in the matrix of an
# expert.
Contribution = tuple[str, Tensor | Side, Tensor | Side | Routed | None]


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass.

    Args:
        args: positional arguments.
        kwargs: named arguments.
        output: what the module returned.
        split: the batch's examples.
        sums: where the contributions go.
        shared: finds layers that take the same input; None where nothing is gained.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    split: ExampleSplit
    sums: Sums
    shared: SharedInputs | None = None

    @property
    def input(self) -> Tensor:
        """The first argument."""
        return self._first.detach()

    @property
    def has_input(self) -> bool:
        """Whether the first argument is a tensor."""
        return isinstance(self._first, Tensor)

    @property
    def _first(self) -> Any:
        return next(iter(self.args or self.kwargs.values()), None)


class Rule(ABC):
    """How the parameters of one module get their per-example gradients.

    A rule is asked in each forward pass and again when the gradient of the module's
    output is there. What it finds out about the module on the first call are fields.

    Args:
        module: the module, with trainable parameters of its own.
        path: its name in the model.
        names: the sketch's names of its parameters, by attribute.
    """

    def __init__(self, module: nn.Module, path: str, names: dict[str, str]) -> None:
        self.module = module
        self.path = path
        self.names = names
        # Of parameters of modules within it, which count if those were not called.
        self.borrowed: dict[str, str] = {}
        # Whether an output that all examples share may be given to each of them.
        self.expands = True
        # Whether it reads gradients within the module, whatever that returns.
        self.within = False
        # Whether the module is known to be run again for each example.
        self.runs_again = False

    def forget(self) -> None:  # noqa: B027
        """Forget what the first call has shown of the module, if it shows anything."""

    def open(self, current: Callable[[], object]) -> list[Callable[[], object]]:
        """Watch what hooks do not see, and return what ends that.

        Args:
            current: gives the batch that is recorded, if any.
        """
        return []

    @property
    def kind(self) -> tuple[str, type["Rule"]]:
        """The path without the numbers of layers and experts, and the class."""
        return kind_of(self.path), type(self)

    def __str__(self) -> str:
        return f"{type(self.module).__name__} at {self.path!r}"

    def outputs_of(self, output: Any) -> list[Tensor]:
        """Return the tensors whose gradients are those of the module's call."""
        return answers_of(output) if self.is_model(output) else tensors_of(output)

    def is_model(self, output: Any) -> bool:
        """Whether the module is the model, or a model within it that has a loss."""
        return not self.path or (isinstance(output, Mapping) and "loss" in output)

    @abstractmethod
    def forward(self, call: Call) -> Any:
        """Return what `backward` needs of a call; None if the rule does not apply."""

    def watched(self, saved: Any, output: Tensor) -> Iterable[tuple[Any, Tensor]]:
        """Return the tensors whose gradients `backward` takes, and what else of each.

        By default there is the output alone.
        """
        return [(saved, output)]

    @abstractmethod
    def backward(self, saved: Any, gradient: Tensor) -> Iterable[Contribution]:
        """Yield the parameters' gradients, given that of what is watched."""


class NoRule(Rule):
    """A module of an unknown kind, which is run again for each example."""

    def __init__(self, module: nn.Module, path: str, names: dict[str, str]) -> None:
        super().__init__(module, path, names)
        self.runs_again = True

    def forward(self, call: Call) -> None:
        return None

    def backward(self, saved: Any, gradient: Tensor) -> Iterable[Contribution]:
        raise AssertionError("a module without a rule is run again")


@lru_cache(maxsize=2**14)  # a memo of a pure function: each batch asks for all
def kind_of(path: str) -> str:
    """Return a module's path without the numbers of layers and experts."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", path)


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors in a module's output."""
    leaves = [output] if isinstance(output, Tensor) else tree_leaves(output)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def answers_of(output: Any) -> list[Tensor]:
    """The tensors in a model's output through which its losses come.

    Scores, if there are any: other outputs may lie before them. Otherwise all that are
    not scalars, as losses are.
    """
    if isinstance(output, Mapping):
        fields: Mapping[Any, Any] = output
        scores = [value for name, value in fields.items() if _names_scores(str(name))]
        if found := tensors_of([x for x in scores if isinstance(x, Tensor)]):
            return found
    several = [x for x in tensors_of(output) if x.dim()]
    return several[:1] if isinstance(output, tuple) else several


def _names_scores(name: str) -> bool:
    return any(word in name for word in ("logits", "log_probs", "entropy", "scores"))


def tokens(split: ExampleSplit, x: Tensor) -> Tensor:
    """Merge all dimensions between the example and the features: (b, t, f)."""
    rows = split.rows(x)
    assert rows is not None
    return rows.reshape(len(rows), -1, rows.shape[-1])


def over_tokens(split: ExampleSplit, x: Tensor, features: int = 1) -> Tensor:
    """Sum over each example's tokens: (b, elements of the last `features` axes)."""
    return summed(tokens(split, x.flatten(x.dim() - features)))


def summed(x: Tensor) -> Tensor:
    """Sum over the tokens: (b, t, ...) -> (b, ...).

    On an accelerator in the dtype of rows, which would be another operation.
    """
    return x.sum(1, dtype=None if reads_freely(x) else accumulation_dtype(x.dtype))


def is_kept(x: Tensor, output: Tensor) -> bool:
    """Return whether autograd keeps a layer's input as it is for the weight's gradient.

    It keeps a copy in another dtype under autocast, and less where activations are
    computed again or moved elsewhere.
    """
    library: Any = torch  # which has no public way to ask
    hooks = library._C._autograd._top_saved_tensors_default_hooks(True)
    return x.dtype == output.dtype and hooks is None
