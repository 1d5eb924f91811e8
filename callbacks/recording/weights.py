"""What each optimizer step does to the weights, and whatever else changes them."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import torch
from accelerate.state import PartialState
from torch import Tensor, nn

from hf_sketch.ledger.balance import Balance
from hf_sketch.model.accumulator import Accumulator
from hf_sketch.model.fsdp import in_row_shards, own_part
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.processes import reduced
from hf_sketch.sketches.operator import accumulation_dtype
from hf_sketch.store.rows import UPDATE, row_columns

from .steps import check_layout_of_shards

Append = Callable[[str, Mapping[str, Tensor]], None]


class WeightLedger:
    """Records each change of the trained weights as a row.

    The weights are much larger than an update, so a sketch of them in float32 would
    lose most of it: the weights are kept as they were, and their difference is what is
    sketched. The processes share that work. Each answers for some parameters, or for
    its shards (FSDP2), keeps a copy of these alone, and their sketches add up.

    A row's balance is that of the weights after it; see `Balance`. A run begins with a
    row of no change, whose balance is taken of the weights themselves.

    Args:
        model_sketch: the map.
        model: model that the weights belong to.
        append: takes the rows of a kind, in the first process.

    Raises:
        ValueError: FSDP has split parameters that the layout needs whole.
    """

    def __init__(
        self, model_sketch: ModelSketch, model: nn.Module, append: Append
    ) -> None:
        self._model_sketch, self._append = model_sketch, append
        parameters = model_sketch.parameters_of(model)
        processes, names = PartialState(), sorted(parameters)
        self._in_shards = in_row_shards(parameters.values())
        check_layout_of_shards(model_sketch, self._in_shards)
        if not self._in_shards:  # every process has all of them
            rank, count = processes.process_index, processes.num_processes
            names = list(islice(names, rank, None, count))
        self._own = {name: parameters[name] for name in names}
        self._kept = {name: part.clone() for name, part, _ in self._parts()}
        self._device = torch.empty(0, device=processes.device).device
        self._wide = self._device
        if self._device.type == "mps":  # which has no float64
            self._wide = torch.device("cpu")
        self._map = Balance(model_sketch.row_size, model_sketch.seed)
        self._balance: Tensor | None = None

    def start_run(self, epoch: int, step: int) -> None:
        """Record the balance of the weights as they are; all processes call together.

        Args:
            epoch: the one that begins.
            step: optimizer steps before it.
        """
        total = self._model_sketch.sketch_sum()
        for name, part, start in self._parts():
            self._add(total, name, part.to(self._wide, torch.float64), start)
        weights = self._result(total, torch.float64)
        self._balance = self._map.of(weights)
        position = {"epoch": epoch, "step": step, "learning_rate": 0.0}
        self._record(torch.zeros_like(weights).float(), position, False)

    def record(self, position: Mapping[str, float], by_optimizer: bool) -> None:
        """Record how weights differ from what they were when this was last called.

        All processes call together. Other changes than the optimizer's have a row only
        if there are any.
        """
        if by_optimizer or self._changed():
            self._record(self._change(), position, by_optimizer)

    def _changed(self) -> bool:
        """Return whether weights, of any process, are not as they were kept."""
        found = torch.zeros((), device=self._device)
        for name, part, _ in self._parts():
            kept = self._kept[name]
            if part.is_cpu:  # without a mask of the model's size
                found += not torch.equal(part, kept)
            else:  # without waiting for the device
                found += (part != kept).any()
        return bool(reduced(found, "sum") > 0)

    def _parts(self) -> Iterator[tuple[str, Tensor, int]]:
        """The weights that this process answers for, and where in each they start."""
        for name, parameter in self._own.items():
            part, start = own_part(parameter.detach())
            if len(part):
                yield name, part, start

    def _change(self) -> Tensor:
        """Sketch the change of the weights since they were kept, and keep them."""
        total = self._model_sketch.sketch_sum()
        for name, part, start in self._parts():
            # In place, for float32: the weights before minus those after.
            kept = self._kept[name]
            negative = kept.to(accumulation_dtype(kept.dtype)).sub_(part)
            self._add(total, name, negative, start)
        change = self._result(total, torch.float32).neg()
        for name, part, _ in self._parts():  # the sum has held some until now
            self._kept[name].copy_(part)
        return change

    def _add(self, total: Accumulator, name: str, part: Tensor, start: int) -> None:
        """Add the sketch of a parameter, or of a shard of one."""
        if self._in_shards:
            total.add_part(name, part.unsqueeze(0), start)
        else:
            total.add(name, part.unsqueeze(0))

    def _result(self, total: Accumulator, dtype: torch.dtype) -> Tensor:
        """Return the sum of all processes' sketches, (row_size,)."""
        sketch = torch.zeros(self._model_sketch.row_size, device=self._device)
        if total.names:
            sketch = total.result().squeeze(0)
        return reduced(sketch.to(dtype), "sum")

    def _record(
        self, sketch: Tensor, position: Mapping[str, float], by_optimizer: bool
    ) -> None:
        """Hand on a row, with the balance after it."""
        assert self._balance is not None
        self._balance = self._balance + self._map.of(sketch.to(self._wide))
        if PartialState().process_index == 0:
            columns = row_columns(
                sketch.unsqueeze(0),
                **position,
                by_optimizer=torch.tensor([by_optimizer]),
                balance=self._balance.unsqueeze(0),
            )
            self._append(UPDATE, columns)
