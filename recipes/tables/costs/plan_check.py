"""Plans beside measured runs: files, memory, and the seconds that rows take."""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, HfArgumentParser

from hf_sketch import ModelSketch
from hf_sketch.examples.batch import Batch
from hf_sketch.examples.sketcher import ExampleSketcher
from hf_sketch.planning.machine import Machine
from hf_sketch.planning.plan import Plan, plan_recording
from hf_sketch.planning.settings import RowSettings, TrainingRun
from hf_sketch.recipes.meta_models import meta_model
from hf_sketch.recipes.saved_report import save_report
from hf_sketch.recipes.tables.measure import peak_extra_bytes, spread
from hf_sketch.recipes.tables.quality.recorded_runs import Setting, Shape, train
from hf_sketch.recipes.tables.recorders import Ours, bytes_below

_BATCH_SIZE, _TOKENS = 8, 128
_SHAPES = {"1M": (4, 128, 2048), "10M": (6, 320, 8192), "38M": (8, 512, 24000)}
_TINY = {"tiny": (2, 64, 512)}
_NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


@dataclass
class PlanCheckArguments:
    """What a plan says of runs of three sizes, beside what they take."""

    output_dir: str = field(
        default="out/tables", metadata={"help": "Where the JSON goes."}
    )
    model_type: str = field(
        default="gpt2",
        metadata={"help": "gpt2 or llama."},
    )
    layouts: str = field(
        default="factored,blocked", metadata={"help": "Comma-separated."}
    )
    out_size: int = field(default=4096, metadata={"help": "Numbers in a row."})
    steps: int = field(default=8, metadata={"help": "Recorded steps of the store."})
    rounds: int = field(default=7, metadata={"help": "Rounds of a step's seconds."})
    tiny: bool = field(
        default=False, metadata={"help": "One small model and one round, as a check."}
    )


class Clock:
    """Processor seconds of some code, those of all threads divided by their number.

    Unlike the time on the wall they hardly grow where a machine is shared.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Generator[None]:
        """Count the time within."""
        start = time.process_time()
        yield
        self.seconds += (time.process_time() - start) / torch.get_num_threads()

    @contextmanager
    def running_in_hooks(self) -> Generator[None]:
        """Within, count the time of all that the sketcher's hooks do."""
        holding = Batch.holding_failures

        @contextmanager
        def timed(batch: Batch) -> Generator[None]:
            with self.running(), holding(batch):
                yield

        with patch.object(Batch, "holding_failures", timed):
            yield


@dataclass(frozen=True)
class Bench:
    """A model and a batch of which steps are taken.

    Args:
        model: that trains.
        ids: tokens, (b, t).
        sketch: of its gradient.
    """

    model: nn.Module
    ids: Tensor
    sketch: ModelSketch

    def differentiate(self) -> None:
        """A forward and a backward pass."""
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()

    def record(self) -> None:
        """The same with rows of examples, by an operator that keeps nothing yet."""
        sketch = ModelSketch.from_dict(self.sketch.to_dict())
        with ExampleSketcher(self.model, sketch) as sketcher:
            self.differentiate()
            sketcher.take()

    def extra_bytes(self) -> int:
        """By which rows of examples raise the peak of memory."""
        peaks = [self._peak(action) for action in (self.record, self.differentiate)]
        return peaks[0] - peaks[1]

    def seconds(self, rounds: int) -> dict[str, list[float]]:
        """Of plain steps, and of all that rows of examples and of the step add."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        found: dict[str, list[float]] = {"step": [], "sketch": []}
        with ExampleSketcher(self.model, self.sketch) as sketcher:
            for number in range(rounds + 1):
                plain, ours = Clock(), Clock()
                self.model.zero_grad()
                with sketcher.paused(), plain.running():
                    self.differentiate()
                    optimizer.step()
                self.model.zero_grad()
                with ours.running_in_hooks():
                    self.differentiate()
                with ours.running():
                    sketcher.take()
                    self._sketch_step()
                if number:  # the first makes what operators and hooks keep
                    found["step"].append(plain.seconds)
                    found["sketch"].append(ours.seconds)
        return found

    def _sketch_step(self) -> None:
        """What a step's row takes: the gradient's norm and its sketch."""
        parameters = self.sketch.parameters_of(self.model)
        gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        for gradient in gradients.values():
            torch.linalg.vector_norm(gradient)
        self.sketch.sketch(gradients)

    def _peak(self, action: Callable[[], None]) -> int:
        self.model.zero_grad()
        action()  # warms up
        self.model.zero_grad()
        return peak_extra_bytes(action)


def shape_of(model_type: str, layers: int, width: int, vocabulary: int) -> Shape:
    """An architecture without dropout, in some size."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width}
    sizes |= {"num_attention_heads": width // 32, "vocab_size": vocabulary}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    if model_type == "gpt2":
        sizes |= _NO_DROPOUT
    else:
        sizes |= {"intermediate_size": 4 * width}
    return Shape(model_type, sizes, _BATCH_SIZE, _TOKENS)


def measured(setting: Setting, layout: str, arguments: Any) -> dict[str, float]:
    """All figures of a plan, of a run of the Trainer and of single steps."""
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
    extra = bench.extra_bytes()
    seconds = bench.seconds(1 if arguments.tiny else arguments.rounds)
    pairs = zip(seconds["sketch"], seconds["step"], strict=True)
    return {
        "row_bytes": row_bytes,
        "store_bytes": store_bytes,
        "extra_bytes": extra,
        "sketch_to_step": median(sketch / step for sketch, step in pairs),
        **{f"step_{name}": x for name, x in spread(seconds["step"]).items()},
        **{f"sketch_{name}": x for name, x in spread(seconds["sketch"]).items()},
    }


def planned(
    shape: Shape, layout: str, arguments: Any, machine: Machine
) -> tuple[Plan, dict[str, float]]:
    """The plan of the same run, and the same figures of it."""
    config = AutoConfig.for_model(shape.model_type, **shape.config)
    run = TrainingRun(
        arguments.steps * shape.batch_size,
        batch_size=shape.batch_size,
        tokens=shape.tokens,
    )
    model = meta_model(config, torch.float32)
    rows = RowSettings(arguments.out_size, layout)
    times = plan_recording(model, run, rows, machine=machine).times
    rows = RowSettings(arguments.out_size, layout, per_step=False)
    plan = plan_recording(model, run, rows, machine=machine)
    return plan, {
        "row_bytes": plan.store.row_bytes,
        "store_bytes": plan.store.total_bytes,
        "extra_bytes": plan.memory.held_bytes,
        "sketch_to_step": times.sketch_seconds / times.step_seconds,
        "step_median_seconds": times.step_seconds,
        "sketch_median_seconds": times.sketch_seconds,
    }


def print_result(name: str, result: Mapping[str, Mapping[str, float]]) -> None:
    """Each figure, planned and measured."""
    print(name)
    for figure, plan in result["planned"].items():
        got = result["measured"][figure]
        print(f"  {figure:22s} {plan:14.5g} {got:14.5g} {plan / got - 1:+8.1%}")


def run_plan_check(arguments: PlanCheckArguments) -> dict[str, Any]:
    """Plan, measure, print and save."""
    shapes = _TINY if arguments.tiny else _SHAPES
    machine = Machine.measured()
    results: dict[str, Any] = {}
    print("figure, planned, measured, difference")
    for size, numbers in tqdm(shapes.items(), desc="Sizes"):
        shape = shape_of(arguments.model_type, *numbers)
        setting = Setting.of_shape(shape, arguments.steps)
        for layout in arguments.layouts.split(","):
            plan, told = planned(shape, layout, arguments, machine)
            results[f"{size} {layout}"] = result = {
                "elements": plan.elements,
                "machine": asdict(machine),
                "planned": told,
                "measured": measured(setting, layout, arguments),
            }
            print_result(f"{size} {layout}", result)
    name = f"plan_check_{arguments.model_type}"
    print("saved", save_report(arguments.output_dir, name, arguments, results))
    return results


if __name__ == "__main__":
    run_plan_check(*HfArgumentParser(PlanCheckArguments).parse_args_into_dataclasses())
