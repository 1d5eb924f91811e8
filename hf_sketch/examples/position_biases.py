"""Relative position biases that all layers and examples share, as in T5."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_sketch.examples.hooks import Batch
from hf_sketch.examples.rules import Contribution
from hf_sketch.model.fsdp import in_row_shards


@dataclass
class PositionBiases:
    """Watches the attention modules that make and take a `position_bias`.

    A bias (1, heads, queries, keys), looked up in the embedding
    `relative_attention_bias` by the first layer's `compute_bias`, is added to the
    scores of all layers. Each layer is given it expanded over the examples, and that
    tensor's gradient is read; the bias itself gets the sums that it gets without, in
    the same order.

    Args:
        tables: the embedding and the sketch's name of its weight, by attention module.
        layers: all modules that may take a bias.
        in_shards: whether layers get their inputs as aliases (FSDP2).
    """

    tables: dict[nn.Module, tuple[nn.Embedding, str]]
    layers: list[nn.Module]
    in_shards: bool = False
    _ids: Tensor | None = None
    _bias: Tensor | None = None
    _name: str = ""
    _expanded: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict[int, Any])

    @classmethod
    def of_model(
        cls, model: nn.Module, parameters: Mapping[str, Tensor]
    ) -> "PositionBiases":
        """Those of a model, whose trainable parameters are given by name."""
        names = {id(parameter): name for name, parameter in parameters.items()}
        tables: dict[nn.Module, tuple[nn.Embedding, str]] = {}
        layers: list[nn.Module] = []
        for module in model.modules():
            if not callable(getattr(module, "compute_bias", None)):
                continue
            layers.append(module)
            table = getattr(module, "relative_attention_bias", None)
            if isinstance(table, nn.Embedding) and id(table.weight) in names:
                tables[module] = table, names[id(table.weight)]
        in_shards = in_row_shards(parameters.values())
        return cls(tables, layers if tables else [], in_shards)

    def covers(self, module: nn.Module) -> bool:
        """Whether this is one of the embeddings."""
        return any(module is table for table, _ in self.tables.values())

    def clear(self) -> None:
        """Let go of the last batch's tensors."""
        self._ids = self._bias = None
        self._expanded = {}

    def register(
        self, current: Callable[[], Batch | None]
    ) -> list["RemovableHandle | _Patch"]:
        """Put the hooks on; `current` gives the batch that is recorded, if any."""

        def note_ids(module: nn.Module, args: Any, output: Tensor) -> None:
            self._ids = args[0]

        def give(module: nn.Module, args: Any, kwargs: Any) -> Any:
            batch, bias = current(), kwargs.get("position_bias")
            if batch is None or bias is None or not self._is_bias(bias):
                return None
            return args, {**kwargs, "position_bias": self._expand(batch, bias)}

        def take_back(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, tuple) or self._bias is None:
                return None
            return tuple(self._expanded.get(id(x), (x, x))[1] for x in output)

        handles: list[RemovableHandle | _Patch] = []
        for module, (table, name) in self.tables.items():
            handles.append(table.register_forward_hook(note_ids))
            handles.append(_Patch(module, self._expanding(module, name, current)))
        for layer in self.layers:
            handles.append(layer.register_forward_pre_hook(give, with_kwargs=True))
            handles.append(layer.register_forward_hook(take_back))
        return handles

    def _expanding(
        self, module: Any, name: str, current: Callable[[], Batch | None]
    ) -> Callable[..., Tensor]:
        """The module's `compute_bias`, with its result given to each example."""
        plain: Callable[..., Tensor] = module.compute_bias

        def compute_bias(*args: Any, **kwargs: Any) -> Tensor:
            bias, batch = plain(*args, **kwargs), current()
            if batch is None or not bias.requires_grad:
                return bias
            if batch.split.starts:
                raise ValueError(
                    "packed documents need a model without a position bias that is "
                    f"shared by all of them, got {type(module).__name__}: pass "
                    "per_example=False."
                )
            self._bias, self._name, self._expanded = bias, name, {}
            return self._expand(batch, bias)

        return compute_bias

    def _expand(self, batch: Batch, bias: Tensor) -> Tensor:
        """The bias for each example, watched: (b, heads, queries, keys)."""
        ids, name, size = self._ids, self._name, batch.split.size
        assert ids is not None
        expanded = bias.expand(size, *bias.shape[1:])
        left = batch.sums.fold(name, ids.reshape(1, -1).expand(size, -1), 0)

        def add(gradient: Tensor) -> None:
            right = gradient.flatten(2).transpose(1, 2)
            folded = batch.sums.fold(name, right, 1)
            batch.sums.add(name, Contribution("weight", left, folded))

        batch.watch(expanded, add)
        self._expanded[id(expanded)] = expanded, bias
        return expanded

    def _is_bias(self, x: Tensor) -> bool:
        """Whether this is the bias that was computed last, or an alias of it."""
        bias = self._bias
        if bias is None or x is bias or not self.in_shards:
            return x is bias
        return x.data_ptr() == bias.data_ptr() and x.shape == bias.shape


@dataclass(frozen=True)
class _Patch:
    """A method of one module, replaced until `remove` is called."""

    module: Any
    method: Callable[..., Tensor]

    def __post_init__(self) -> None:
        self.module.compute_bias = self.method

    def remove(self) -> None:
        del self.module.compute_bias
