"""Other packages that record per-example gradients, each used as its manual says."""

import importlib
import importlib.util
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_sketch.recipes.tables.recorders import (
    PostHocRecorder,
    Recorded,
    Recorder,
    TrainingRecorder,
    bytes_below,
    intervals,
    names_of,
)


class Bergson(TrainingRecorder):
    """The Trainer callback of bergson.

    Args:
        adam: divide by the square root of Adam's second moments, its default.
    """

    note = "weights of Linear and Conv1D below the head, 16 x 16 numbers each, float16"

    def __init__(self, adam: bool) -> None:
        self._adam = adam
        if adam:
            self.note += (
                "; normalized by Adam's second moments from the second step on, so "
                "that r, of the first batch, is that of rows as they are without"
            )

    def attach(self, trainer: Trainer) -> None:
        bergson = importlib.import_module("bergson.huggingface")
        self._store = Path(trainer.args.output_dir)
        self._callback = bergson.GradientCollectorCallback(
            self._store, use_optimizer_state=self._adam
        )
        bergson.prepare_for_gradient_collection(trainer)
        trainer.add_callback(self._callback)
        assert isinstance(trainer.model, nn.Module)
        self._model = trainer.model

    def recorded(self, examples: int, batch_size: int) -> Recorded:
        load = importlib.import_module("bergson.data").load_gradients
        store = self._store / "train" / "epoch_0"
        rows = torch.tensor(load(store)[:batch_size]).float()
        row_bytes = (store / "gradients.bin").stat().st_size / examples
        others = bytes_below(store) - round(row_bytes * examples)
        collector = self._callback.collector
        modules = map(collector.model.get_submodule, collector.target_info)
        covered = names_of(self._model, (module.weight for module in modules))
        return Recorded(rows, row_bytes, others, covered)


class Traker(PostHocRecorder):
    """The features of TRAK, of the loss itself, with its projector for a CPU."""

    note = (
        "the projector's defaults: 2048 numbers, a normal matrix drawn again for each "
        "batch, 100 columns at a time; in float32"
    )
    _out_size = 2048
    _columns = 100

    def obstacle(self, model: nn.Module, batch_size: int) -> str | None:
        elements = sum(p.numel() for p in model.parameters())
        needed = 4 * elements * (self._columns + 2 * batch_size)
        free = psutil.virtual_memory().available
        if needed <= free:
            return None
        return (
            f"its projector's matrix of {elements:,} x {self._columns} float32 is "
            f"{4e-9 * elements * self._columns:.1f} GB, with two copies of "
            f"{batch_size} gradients {1e-9 * needed:.1f} GB; {1e-9 * free:.1f} GB are "
            "free"
        )

    def collect(
        self, model: nn.Module, loader: DataLoader[Any], directory: Path
    ) -> list[float]:
        model.eval()
        traker = importlib.import_module("trak").TRAKer(
            model,
            _LossOutput(),
            train_set_size=len(loader.dataset),  # type: ignore[arg-type]
            save_dir=str(directory),
            device="cpu",
            proj_dim=self._out_size,
            use_half_precision=False,
            logging_level=logging.WARNING,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        ends = [time.perf_counter()]
        for batch in loader:
            inputs = (batch["input_ids"], batch["labels"])
            traker.featurize(inputs, num_samples=len(batch["input_ids"]))
            ends.append(time.perf_counter())
        self._rows = torch.tensor(traker.saver.current_store["grads"])
        self._covered = frozenset(traker.gradient_computer.func_weights)
        self._bytes = bytes_below(directory)
        return intervals(ends)[1:]

    def recorded(self, examples: int, batch_size: int) -> Recorded:
        row_bytes = float(self._rows[0].nbytes)
        others = self._bytes - round(row_bytes * examples)
        return Recorded(self._rows[:batch_size], row_bytes, others, self._covered)


class _LossOutput:
    """What TRAK takes the gradient of: the loss of an example, its weight being 1."""

    @staticmethod
    def get_output(
        model: nn.Module,
        weights: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        input_ids: Tensor,
        labels: Tensor,
    ) -> Tensor:
        inputs = {"input_ids": input_ids[None], "labels": labels[None]}
        call = torch.func.functional_call
        return call(model, (weights, buffers), kwargs=inputs).loss

    @staticmethod
    def get_out_to_loss_grad(
        model: nn.Module,
        weights: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        batch: tuple[Tensor, ...],
    ) -> Tensor:
        return torch.ones(len(batch[0]), 1)


class Dattri(PostHocRecorder):
    """The cache of dattri's LoGra attributor, as its manual has it for a model."""

    note = (
        "its default layers, of a tied head the head's use only, 64 x 64 numbers each, "
        "float32, in memory; no Hessian"
    )

    def obstacle(self, model: nn.Module, batch_size: int) -> str | None:
        return None

    def collect(
        self, model: nn.Module, loader: DataLoader[Any], directory: Path
    ) -> list[float]:
        logging.getLogger("dattri").setLevel(logging.WARNING)
        marks: list[float] = []

        def loss(model: nn.Module, batch: Mapping[str, Tensor], device: str) -> Tensor:
            marks.append(time.perf_counter())
            return model(**batch).loss

        task = importlib.import_module("dattri.task").AttributionTask(
            loss_func=loss, model=model, checkpoints=model.state_dict()
        )
        attributor = importlib.import_module("dattri.algorithm.logra").LoGraAttributor(
            task, hessian="Identity", cache_dir=str(directory)
        )
        attributor.cache(loader)
        marks.append(time.perf_counter())
        self._rows = attributor.offload_manager.cached_gradients[0]
        layers = attributor.layer_names
        self.note = f"{type(self).note}; {len(layers)} layers, {_abridged(layers)}"
        modules = map(model.get_submodule, layers)
        weights = (weight for module in modules for weight in module.parameters())
        self._covered = names_of(model, weights)
        self._others = bytes_below(directory)
        model.zero_grad()
        return intervals(marks)[1:]

    def recorded(self, examples: int, batch_size: int) -> Recorded:
        row_bytes = float(self._rows[0].nbytes)
        return Recorded(self._rows, row_bytes, self._others, self._covered)


@dataclass(frozen=True)
class Peer:
    """How a peer is found and made.

    Args:
        module: what is imported.
        distribution: what is installed.
        recorder: makes its recorder.
    """

    module: str
    distribution: str
    recorder: Callable[[], Recorder]

    @property
    def version(self) -> str | None:
        """That of the installed package, or None."""
        if importlib.util.find_spec(self.module) is None:
            return None
        return metadata.version(self.distribution)


PEERS: Mapping[str, Peer] = {
    "bergson": Peer("bergson", "bergson", partial(Bergson, adam=False)),
    "bergson-adam": Peer("bergson", "bergson", partial(Bergson, adam=True)),
    "traker": Peer("trak", "traker", Traker),
    "dattri": Peer("dattri", "dattri", Dattri),
}


def _abridged(names: list[str]) -> str:
    """The first and the last."""
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
