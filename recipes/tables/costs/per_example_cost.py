"""What per-example rows cost a training run, in paired and alternating runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.pytorch_utils import Conv1D

from hf_sketch import ModelSketch
from hf_sketch.recipes.placement import device_name
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.measure import peak_extra_bytes, spread
from hf_sketch.recipes.tables.paper.table6 import pearson_r
from hf_sketch.recipes.tables.peers import PEERS
from hf_sketch.recipes.tables.quality.recorded_runs import (
    SHAPES,
    Setting,
    Shape,
    exact_products,
    record,
)
from hf_sketch.recipes.tables.recorders import Ours, PostHocRecorder, Recorder
from hf_sketch.sketches import Grouped

PLAIN = "plain"
_LAYOUTS = ("grouped", "factored", "blocked")
_INSPECTED_BATCHES = 2  # the second is the first with all of AdamW's memory

Make = Callable[[], Recorder | None]


@dataclass
class PerExampleCostArguments(ReportArguments):
    """Seconds of a training step with per-example rows, beside a plain one."""

    shape: str = field(
        default="gpt2-small", metadata={"help": f"One of {', '.join(SHAPES)}."}
    )
    runs: str = field(
        default=",".join((*_LAYOUTS, *PEERS)),
        metadata={"help": "Layouts of ours, and peers where they are installed."},
    )
    out_size: int = field(default=4096, metadata={"help": "Numbers in a row of ours."})
    rounds: int = field(default=7, metadata={"help": "Rounds, each with all runs."})
    steps: int = field(
        default=4, metadata={"help": "Steps of a run; the first is not timed."}
    )
    tiny: bool = field(
        default=False, metadata={"help": "A small model and one round, as a check."}
    )

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {[*SHAPES]}, got {self.shape!r}.")
        known = [*_LAYOUTS, *PEERS]
        if unknown := set(self.runs.split(",")) - set(known):
            raise ValueError(f"runs must be among {known}, got {sorted(unknown)}.")
        if self.steps < 2:
            raise ValueError(
                "steps must be at least 2, since the first is not timed, got "
                f"{self.steps}: pass --steps 4."
            )


def runs_of(
    arguments: PerExampleCostArguments, setting: Setting
) -> tuple[dict[str, Make], dict[str, str]]:
    """How to make each run's recorder, and why the other runs are left out."""
    makers: dict[str, Make] = {PLAIN: lambda: None}
    left_out: dict[str, str] = {}
    for name in arguments.runs.split(","):
        if name in _LAYOUTS:
            makers[name] = partial(Ours, arguments.out_size, name)
            continue
        peer = PEERS[name]
        reason = f"{peer.distribution} is not installed"
        if peer.version is not None:
            recorder = peer.recorder()
            reason = None
            if isinstance(recorder, PostHocRecorder):
                reason = recorder.obstacle(setting.model, setting.batch_size)
        if reason is None:
            makers[name] = peer.recorder
        else:
            left_out[name] = reason
    return makers, left_out


def inspect(
    setting: Setting, make: Make, exact: Mapping[str, Tensor]
) -> tuple[dict[str, Any], str]:
    """The memory of a run, its rows beside exact inner products, and its note."""
    recorder = make()
    size = setting.batch_size
    model_bytes = sum(p.nbytes for p in setting.model.parameters())
    with TemporaryDirectory() as name:
        setting.restore()
        action = partial(record, setting, recorder, Path(name), _INSPECTED_BATCHES)
        figures: dict[str, Any] = {"peak_bytes": peak_extra_bytes(action) + model_bytes}
        if recorder is None:
            return figures, ""
        recorded = recorder.recorded(_INSPECTED_BATCHES * size, size)
    exact = {name: products.cpu() for name, products in exact.items()}
    elements = {name: setting.weights[name].numel() for name in exact}
    seen = [products for name, products in exact.items() if name in recorded.covered]
    figures |= {
        "during_training": not isinstance(recorder, PostHocRecorder),
        "numbers_in_a_row": recorded.rows.shape[1],
        "row_bytes": recorded.row_bytes,
        "other_bytes": recorded.other_bytes,
        "coverage": sum(map(elements.__getitem__, recorded.covered))
        / sum(elements.values()),
        "pearson_r": pearson_r(sum(exact.values()), recorded.rows),
        "pearson_r_of_covered": pearson_r(sum(seen), recorded.rows),
    }
    return figures, recorder.note


def alternate(
    setting: Setting, makers: Mapping[str, Make], rounds: int, steps: int
) -> dict[str, list[float]]:
    """Seconds of a step in each round, all runs in turn, every other round backwards.

    A step lasts from the end of the one before; the first has none, and is not timed.
    The median of a run's steps counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for number in tqdm(range(rounds), desc="Rounds"):
        for name in list(makers)[:: -1 if number % 2 else 1]:
            setting.restore()
            with TemporaryDirectory() as directory:
                times = record(setting, makers[name](), Path(directory), steps)
            seconds[name].append(median(times))
    return seconds


def fast_path_floor(model: nn.Module, out_size: int, tokens: int) -> dict[str, int]:
    """What the grouped layout has to do in a step at the least, and the layers do.

    Returns:
        folded: numbers in the layers' inputs and output gradients, each added once.
        outer: multiply-adds of the rotations and of the products of groups.
        layers: multiply-adds of the layers' own products, forward and backward.
    """
    sketch = ModelSketch.from_model(model, out_size, "grouped")
    parameters = sketch.parameters_of(model)
    grouped = {
        id(parameters[name]): operator
        for name, operator in sketch.operators.items()
        if isinstance(operator, Grouped)
    }
    counts = dict.fromkeys(("folded", "outer", "layers"), 0)
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Embedding, Conv1D)):
            continue
        looked_up = isinstance(module, nn.Embedding)
        if not looked_up:
            counts["layers"] += 3 * tokens * module.weight.numel()
        if operator := grouped.get(id(module.weight)):
            sides = module.weight.shape
            counts["folded"] += tokens * (sides[1] if looked_up else sum(sides))
            rotated = sum(operator.widths) * operator.groups
            counts["outer"] += tokens * (rotated + out_size)
    return counts


def print_report(results: Mapping[str, Any]) -> None:
    """All that was measured."""
    counts = results["floor"]
    read = 4 * counts["folded"]
    share = (counts["folded"] + counts["outer"]) / counts["layers"]
    print(
        "the floor of 'grouped': one addition for each of the "
        f"{counts['folded']:,} numbers a step in the inputs and output gradients of "
        f"its layers,\n  i.e. one read of {read / 1e6:.1f} MB, and {counts['outer']:,} "
        f"multiply-adds of rotations and groups: {share:.2%} of the\n"
        f"  {counts['layers']:,} multiply-adds of the layers' own products"
    )
    print(
        "seconds of a step, from the end of the one before (the first is left out; in "
        "it ours measures its error): median (least..greatest) over the rounds;\n"
        "median ratio to the plain run of the same round (least..greatest); peak of "
        "what torch holds in two steps beyond the plain run's;\n"
        "bytes of a row, and of all else in the store; share of the trainable elements "
        "seen; r of inner products with exact ones (with those of the parameters seen)"
    )
    for name, figures in results["runs"].items():
        print(_line(name, figures))
    for name, note in results["notes"].items():
        print(f"  {name}: {note}")
    for name, reason in results["left_out"].items():
        print(f"  {name} left out: {reason}")


def _line(name: str, figures: Mapping[str, Any]) -> str:
    """One run."""
    seconds = "{median_seconds:.4g} ({least_seconds:.4g}..{greatest_seconds:.4g})"
    cells = [f"  {name:12s} {seconds.format(**figures):28s}"]
    ratios = "{ratio_to_plain:7.3f}x ({least_ratio:.3f}..{greatest_ratio:.3f})"
    cells.append(ratios.format(**figures))
    if name == PLAIN:
        return " ".join([*cells, f"{figures['peak_bytes'] / 2**20:9.1f} MiB in all"])
    cells.append(f"{figures['extra_peak_bytes'] / 2**20:+9.1f} MiB")
    cells.append(f"({figures['extra_peak_fraction']:+.1%})")
    cells.append(f"{figures['row_bytes']:9,.0f} + {figures['other_bytes']:,} B")
    cells.append(f"{figures['coverage']:7.1%}  r {figures['pearson_r']:.3f}")
    cells.append(f"({figures['pearson_r_of_covered']:.3f})")
    when = "" if figures["during_training"] else "  after training, a batch"
    return " ".join(cells) + when


def figures_of(
    inspected: Mapping[str, tuple[dict[str, Any], str]],
    seconds: Mapping[str, list[float]],
) -> dict[str, dict[str, Any]]:
    """What was inspected and timed of each run, beside the plain one."""
    plain = inspected[PLAIN][0]["peak_bytes"]
    runs: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        figures, _ = inspected[name]
        extra = figures["peak_bytes"] - plain
        ratios = [a / b for a, b in zip(times, seconds[PLAIN], strict=True)]
        runs[name] = {
            **spread(times),
            "ratio_to_plain": median(ratios),
            "least_ratio": min(ratios),
            "greatest_ratio": max(ratios),
            "extra_peak_bytes": extra,
            "extra_peak_fraction": extra / plain,
            **figures,
        }
    return runs


def print_setting(setting: Setting, shape: Shape, versions: Mapping[str, str]) -> None:
    """What every run trains."""
    elements = sum(p.numel() for p in setting.model.parameters())
    print(
        f"{shape.model_type}: {elements:,} elements, {shape.batch_size} x "
        f"{shape.tokens} tokens a step, on {device_name()}, "
        f"{torch.get_num_threads()} threads; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peers: {versions or 'none installed'}"
    )


def run_per_example_cost(arguments: PerExampleCostArguments) -> dict[str, Any]:
    """Measure, print and save."""
    shape = SHAPES[arguments.shape]
    shape = shape.tiny if arguments.tiny else shape
    setting = Setting.of_shape(shape, max(arguments.steps, _INSPECTED_BATCHES))
    makers, left_out = runs_of(arguments, setting)
    installed = {peer.distribution: peer.version for peer in PEERS.values()}
    versions = {name: version for name, version in installed.items() if version}
    print_setting(setting, shape, versions)
    exact = exact_products(setting)
    inspected = {name: inspect(setting, make, exact) for name, make in makers.items()}
    rounds = 1 if arguments.tiny else arguments.rounds
    seconds = alternate(setting, makers, rounds, arguments.steps)
    tokens = shape.batch_size * shape.tokens
    results = {
        "runs": figures_of(inspected, seconds),
        "floor": fast_path_floor(setting.model, arguments.out_size, tokens),
        "notes": {name: note for name, (_, note) in inspected.items() if note},
        "left_out": left_out,
        "peer_versions": versions,
    }
    print_report(results)
    name = f"per_example_cost_{arguments.shape}"
    print("saved", save_report(arguments.output_dir, name, arguments, results))
    return results


if __name__ == "__main__":
    run_per_example_cost(
        *HfArgumentParser(PerExampleCostArguments).parse_args_into_dataclasses()
    )
