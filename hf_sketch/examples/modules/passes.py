"""Passes of a model whose parameters' gradients are read one by one."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sketch.examples.calls import ModelCall, loss_of
from hf_sketch.examples.rules.base import answers_of
from hf_sketch.examples.split import ExampleSplit
from hf_sketch.model.fsdp import WholeParameters, in_shards
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.model.zero import in_partitions
from hf_sketch.processes import of_first

Read = Callable[[str, Tensor], None]


class Passes:
    """Runs a model, and reads its parameters' gradients, of which it holds none.

    Args:
        model: the model, not within a call.
        parameters: its trainable parameters, by name.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self.model, self.parameters = model, parameters
        self._parameters = WholeParameters(model, parameters)
        self._whole: dict[str, Tensor] = {}

    @property
    def graphs_serve_once(self) -> bool:
        """Whether a graph serves a single backward pass, as under ZeRO-3."""
        return in_partitions(self.parameters.values())

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the parameters in the last call of `forward`."""
        return next(iter(self._whole.values())).dtype

    def forward(self, call: ModelCall) -> Any:
        """Return what the model gives."""
        with self._parameters.noted() as self._whole:
            return call.run(self.model)

    def backward(
        self,
        outputs: Sequence[Tensor],
        read: Read,
        output_gradients: Sequence[Tensor] | None = None,
    ) -> None:
        """Read the gradients of the parameters that are reached, and keep the graph.

        The last call of `forward` must have given the outputs.
        """

        def hook(name: str, gradient: Tensor) -> Tensor | None:
            with torch.no_grad():
                if isinstance(gradient, DTensor):  # the same in all processes
                    return read(name, gradient.full_tensor())
                read(name, gradient)
            return gradient.new_zeros(()).expand(gradient.shape)  # takes no memory

        with ExitStack() as hooks:
            for name, tensor in self._whole.items():
                hooks.callback(tensor.register_hook(partial(hook, name)).remove)
            torch.autograd.grad(
                outputs,
                list(self._whole.values()),
                output_gradients,
                retain_graph=True,
                allow_unused=True,
            )

    def of_loss(self, call: ModelCall, read: Read) -> None:
        """Read the gradients of the model's own loss."""
        loss = loss_of(self.forward(call))
        assert loss is not None
        self.backward([loss], read)

    def loss_sketch(self, call: ModelCall, model_sketch: ModelSketch) -> Tensor:
        """Return the sketch of the gradient of the model's own loss, on the CPU."""
        loss = loss_of(self.forward(call))
        assert loss is not None
        return self.sketch([loss], model_sketch)

    def sketch(
        self,
        outputs: Sequence[Tensor],
        model_sketch: ModelSketch,
        output_gradients: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return the sketch of what `backward` reads, on the CPU.

        Where parameters are in shards, it is the first process's, so that all of them
        draw the same conclusions.
        """
        total = model_sketch.sketch_sum()

        def add(name: str, gradient: Tensor) -> None:
            total.add(name, gradient.reshape(1, -1))

        self.backward(outputs, add, output_gradients)
        found = torch.zeros(model_sketch.row_size, dtype=torch.float64)
        if total.names:
            found = total.result().squeeze(0).to("cpu", torch.float64)
        return of_first(found) if in_shards(self.parameters.values()) else found


def answers_in(output: Any, split: ExampleSplit) -> list[Tensor]:
    """Return the answers that train and divide into examples; else the loss."""
    some = [x for x in answers_of(output) if x.requires_grad]
    divided = [x for x in some if split.within(x) is not None]
    loss = loss_of(output)
    alone = [] if loss is None or not loss.requires_grad else [loss]
    return divided or alone
