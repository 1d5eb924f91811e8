"""Plans beside measured runs: files, memory, and the seconds that rows take."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, HfArgumentParser

from hf_sketch import ExampleSketcher, ModelSketch
from hf_sketch.planning.plan import Plan, plan_recording
from hf_sketch.planning.rate import measured_rate
from hf_sketch.planning.settings import RowSettings, TrainingRun
from hf_sketch.recipes.meta_models import meta_model
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.measure import peak_extra_bytes
from hf_sketch.recipes.tables.quality.recorded_runs import Setting, Shape, train
from hf_sketch.recipes.tables.recorders import Ours, bytes_below

_BATCH_SIZE, _TOKENS = 8, 128
_SHAPES = {"1M": (4, 128, 2048), "10M": (6, 320, 8192), "38M": (8, 512, 24000)}
_TINY = {"tiny": (2, 64, 512)}
_NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


@dataclass
class PlanCheckArguments(ReportArguments):
    """Compare plans of runs of three sizes with what these runs take."""

    model_type: str = field(default="gpt2", metadata={"help": "gpt2 or llama."})
    layouts: str = field(
        default="grouped,blocked", metadata={"help": "Layouts, comma-separated."}
    )
    out_size: int = field(default=4096, metadata={"help": "Numbers per row."})
    steps: int = field(default=8, metadata={"help": "Recorded steps of the store."})
    rounds: int = field(default=7, metadata={"help": "Rounds of a step's seconds."})
    tiny: bool = field(
        default=False, metadata={"help": "Run one small model and round, as a check."}
    )


@dataclass(frozen=True)
class Bench:
    """A model and a batch to take steps on.

    Args:
        model: model to train.
        ids: tokens, (b, t).
        sketch: map of its gradient.
    """

    model: nn.Module
    ids: Tensor
    sketch: ModelSketch

    def differentiate(self) -> None:
        """Run a forward and a backward pass."""
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()

    def record(self) -> None:
        """Do the same with rows of examples, by a map that keeps nothing yet."""
        sketch = ModelSketch.from_dict(self.sketch.to_dict())
        with ExampleSketcher(self.model, sketch) as sketcher:
            self.differentiate()
            sketcher.take()

    def extra_bytes(self) -> int:
        """Return by how much rows of examples raise the peak of memory."""
        peaks = [self._peak(action) for action in (self.record, self.differentiate)]
        return peaks[0] - peaks[1]

    def sketch_seconds(self, rounds: int) -> float:
        """Return what rows add to a step, the median of rounds in turn."""
        with ExampleSketcher(self.model, self.sketch) as sketcher:
            plain, recorded = [], []
            for _ in range(rounds + 1):
                with sketcher.paused():
                    plain.append(self._seconds(self.differentiate))
                recorded.append(self._seconds(lambda: self._step(sketcher)))
        return median(recorded[1:]) - median(plain[1:])  # the first one warms up

    def _step(self, sketcher: ExampleSketcher) -> None:
        self.differentiate()
        sketcher.take()
        parameters = self.sketch.parameters_of(self.model)
        gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        self.sketch.sketch(gradients)

    def _seconds(self, action: Callable[[], None]) -> float:
        """The processor's time, which hardly grows where a machine is shared."""
        self.model.zero_grad()
        start = time.process_time()
        action()
        return (time.process_time() - start) / torch.get_num_threads()

    def _peak(self, action: Callable[[], None]) -> int:
        self.model.zero_grad()
        action()  # warms up
        self.model.zero_grad()
        return peak_extra_bytes(action)


def shape_of(model_type: str, layers: int, width: int, vocabulary: int) -> Shape:
    """Return an architecture without dropout, in some size."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width}
    sizes |= {"num_attention_heads": width // 32, "vocab_size": vocabulary}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    if model_type == "gpt2":
        sizes |= _NO_DROPOUT
    else:
        sizes |= {"intermediate_size": 4 * width}
    return Shape(model_type, sizes, _BATCH_SIZE, _TOKENS)


def measured(setting: Setting, layout: str, arguments: Any) -> dict[str, float]:
    """Return the figures of a run of the Trainer and of single steps."""
    examples = arguments.steps * setting.batch_size
    with TemporaryDirectory() as name:
        recorder = Ours(arguments.out_size, layout)
        setting.restore()
        train(setting, recorder, Path(name), arguments.steps)
        row_bytes = recorder.recorded(examples, setting.batch_size).row_bytes
        store_bytes = bytes_below(Path(name) / "sketches")
    (batch,) = setting.loader(1)
    sketch = ModelSketch.from_model(setting.model, arguments.out_size, layout)
    bench = Bench(setting.model, batch["input_ids"], sketch)
    return {
        "row_bytes": row_bytes,
        "store_bytes": store_bytes,
        "extra_bytes": bench.extra_bytes(),
        "sketch_seconds": bench.sketch_seconds(arguments.rounds),
    }


def planned(
    shape: Shape, layout: str, arguments: Any, rate: float
) -> tuple[Plan, dict[str, float | None]]:
    """Return the plan of the same run, and the same figures of it."""
    config = AutoConfig.for_model(shape.model_type, **shape.config)
    run = TrainingRun(
        arguments.steps * shape.batch_size,
        batch_size=shape.batch_size,
        tokens=shape.tokens,
    )
    model = meta_model(config, torch.float32)
    rows = RowSettings(arguments.out_size, layout)
    seconds = plan_recording(model, run, rows, None, rate).step_seconds
    plan = plan_recording(
        model, run, RowSettings(arguments.out_size, layout, per_step=False)
    )
    return plan, {
        "row_bytes": plan.store.row_bytes,
        "store_bytes": plan.store.total_bytes,
        "extra_bytes": plan.held_bytes,
        "sketch_seconds": seconds,
    }


def print_result(name: str, result: Mapping[str, Mapping[str, float]]) -> None:
    """Print each figure, planned and measured."""
    print(name)
    for figure, plan in result["planned"].items():
        got = result["measured"][figure]
        print(f"  {figure:22s} {plan:14.5g} {got:14.5g} {plan / got - 1:+8.1%}")


def run_plan_check(arguments: PlanCheckArguments) -> dict[str, Any]:
    """Plan, measure, print and save."""
    shapes = _TINY if arguments.tiny else _SHAPES
    results: dict[str, Any] = {}
    print("figure, planned, measured, difference")
    for size, numbers in tqdm(shapes.items(), desc="Sizes"):
        shape = shape_of(arguments.model_type, *numbers)
        setting = Setting.of_shape(shape, arguments.steps)
        for layout in arguments.layouts.split(","):
            rate = measured_rate(RowSettings(arguments.out_size, layout))
            plan, figures = planned(shape, layout, arguments, rate)
            results[f"{size} {layout}"] = result = {
                "elements": plan.elements,
                "numbers_per_second": rate,
                "planned": figures,
                "measured": measured(setting, layout, arguments),
            }
            print_result(f"{size} {layout}", result)
    name = f"plan_check_{arguments.model_type}"
    print("saved", save_report(arguments.output_dir, name, arguments, results))
    return results


if __name__ == "__main__":
    run_plan_check(*HfArgumentParser(PlanCheckArguments).parse_args_into_dataclasses())
