"""The rule of relative position biases that all layers and examples share, as in T5."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from hf_sketch.examples.batch import Batch
from hf_sketch.examples.split import Packed


class PositionBiases:
    """Watches the attention modules that make and take a `position_bias`.

    The first layer's `compute_bias` looks up a bias (1, heads, queries, keys) in the
    embedding `relative_attention_bias`; all layers add it to their scores. Each layer
    gets it expanded over the examples, and that tensor's gradient is read. The bias
    itself gets the sums that it gets otherwise, in the same order.

    Args:
        model: the model.
        parameters: its trainable parameters, by name.
        in_shards: layers get their inputs as aliases (FSDP2, ZeRO-3).
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, Tensor], in_shards: bool
    ) -> None:
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._in_shards = in_shards
        self._layers = [
            module
            for module in model.modules()
            if callable(getattr(module, "compute_bias", None))
        ]
        # The embedding and the sketch's name of its weight, by attention module.
        self.tables: dict[nn.Module, tuple[nn.Embedding, str]] = {}
        for module in self._layers:
            table = getattr(module, "relative_attention_bias", None)
            if isinstance(table, nn.Embedding) and id(table.weight) in names:
                self.tables[module] = table, names[id(table.weight)]
        self.names = {name for _, name in self.tables.values()}
        self.clear()

    def covers(self, module: nn.Module) -> bool:
        """Return whether this is one of the embeddings."""
        return any(module is table for table, _ in self.tables.values())

    def clear(self) -> None:
        """Let go of the last batch's tensors."""
        self._ids: Tensor | None = None
        self._bias: Tensor | None = None
        self._name = ""
        self._expanded: dict[int, tuple[Tensor, Tensor]] = {}

    def register(
        self, current: Callable[[], Batch | None]
    ) -> list[Callable[[], object]]:
        """Put the hooks on and return what takes them off.

        `current` gives the batch that is recorded, if any.
        """
        undo: list[Callable[[], object]] = []
        for module, (table, name) in self.tables.items():
            undo.append(table.register_forward_hook(self._note_ids).remove)
            self._replace_method(module, name, current)
            undo.append(partial(delattr, module, "compute_bias"))
        for layer in self._layers if self.tables else ():
            give = partial(self._give, current)
            hook = layer.register_forward_pre_hook(give, with_kwargs=True)
            # Before the hook of ZeRO-3 that replaces every output by an alias.
            take = layer.register_forward_hook(self._take_back, prepend=self._in_shards)
            undo += [hook.remove, take.remove]
        return undo

    def _note_ids(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._ids = args[0]

    def _give(
        self,
        current: Callable[[], Batch | None],
        module: nn.Module,
        args: Any,
        kwargs: Any,
    ) -> Any:
        """Give a layer the bias expanded over the examples."""
        batch, bias = current(), kwargs.get("position_bias")
        if batch is None or bias is None or not self._is_bias(bias):
            return None
        return args, {**kwargs, "position_bias": self._expand(batch, bias)}

    def _take_back(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the bias as it was in a layer's outputs."""
        if not isinstance(output, tuple) or self._bias is None:
            return None
        return tuple(self._expanded.get(id(x), (x, x))[1] for x in output)

    def _replace_method(
        self, module: Any, name: str, current: Callable[[], Batch | None]
    ) -> None:
        """Make the module's `compute_bias` give its result to each example."""
        plain: Callable[..., Tensor] = module.compute_bias

        def compute_bias(*args: Any, **kwargs: Any) -> Tensor:
            bias, batch = plain(*args, **kwargs), current()
            if batch is None or not bias.requires_grad:
                return bias
            if isinstance(batch.split, Packed):
                raise ValueError(
                    "packed documents need a model without a position bias that is "
                    f"shared by all of them, got {type(module).__name__}: pass "
                    "per_example=False."
                )
            self._bias, self._name, self._expanded = bias, name, {}
            return self._expand(batch, bias)

        module.compute_bias = compute_bias

    def _expand(self, batch: Batch, bias: Tensor) -> Tensor:
        """Return the bias for each example, watched: (b, heads, queries, keys)."""
        ids, name, size = self._ids, self._name, batch.split.size
        assert ids is not None
        expanded = bias.expand(size, *bias.shape[1:])
        left = ids.reshape(1, -1).expand(size, -1)

        def add(gradient: Tensor) -> None:
            right = gradient.flatten(2).transpose(1, 2)
            batch.sums.add_outer(name, left, right)

        batch.watch(expanded, add)
        self._expanded[id(expanded)] = expanded, bias
        return expanded

    def _is_bias(self, x: Tensor) -> bool:
        """Return whether this is the bias that was computed last, or an alias of it."""
        bias = self._bias
        if bias is None or x is bias or not self._in_shards:
            return x is bias
        return x.data_ptr() == bias.data_ptr() and x.shape == bias.shape
