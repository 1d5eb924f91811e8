"""What sketching one step's gradient costs, beside an AdamW step and a read of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import HfArgumentParser

from hf_sketch import ModelSketch
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.measure import peak_extra_bytes, spread, timed
from hf_sketch.recipes.tables.models.language_model import random_language_model


@dataclass
class StepCostArguments(ReportArguments):
    """Seconds of one gradient sketch, as ratios to an AdamW step in the same run."""

    model_type: str = field(
        default="gpt2", metadata={"help": "Default configuration with random weights."}
    )
    sketches: str = field(
        default="blocked/srht,blocked/affd,blocked/afjl,grouped/srht,flat/srht:12,"
        "flat/affd:12",
        metadata={
            "help": "Pairs of layout/operator, comma-separated; with :12 behind, of "
            "that log2 of the size alone."
        },
    )
    bits: str = field(
        default="10,12,14,16,18", metadata={"help": "log2 of the sketch sizes."}
    )
    rounds: int = field(default=7, metadata={"help": "Rounds, after one not counted."})
    tiny: bool = field(
        default=False, metadata={"help": "A small model and one round, as a check."}
    )


def actions_of(
    parameters: dict[str, torch.nn.Parameter], arguments: StepCostArguments
) -> dict[str, Callable[[], Any]]:
    """The yardsticks and every sketch, by name."""
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    optimizer = torch.optim.AdamW(parameters.values(), foreach=True)
    shapes = tuple((name, tuple(p.shape)) for name, p in parameters.items())

    def read() -> list[Tensor]:
        return [gradient.sum() for gradient in gradients.values()]

    actions: dict[str, Callable[[], Any]] = {"adamw": optimizer.step, "read": read}
    for given in arguments.sketches.split(","):
        name, _, only = given.partition(":")
        layout, operator = name.split("/")
        for bits in map(int, (only or arguments.bits).split(",")):
            sketch = ModelSketch(shapes, 2**bits, layout, 0, operator)

            def run(sketch: ModelSketch = sketch) -> Tensor:
                return sketch.sketch(gradients)

            actions[f"{name} 2^{bits}"] = run
    return actions


def run_step_cost(arguments: StepCostArguments) -> dict[str, dict[str, float]]:
    """Measure, print and save."""
    model = random_language_model(arguments.model_type, arguments.tiny)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    actions = actions_of(parameters, arguments)
    seconds = timed(actions, 1 if arguments.tiny else arguments.rounds)
    elements = sum(p.numel() for p in parameters.values())
    print(f"{elements:,} elements, {4 * elements / 1e6:.0f} MB: the floor is one read")
    print(
        "seconds: median (least..greatest); ratio to adamw; ratio of the least; "
        "extra peak MiB"
    )
    results: dict[str, dict[str, float]] = {}
    for name, times in seconds.items():
        ratio = median(a / b for a, b in zip(times, seconds["adamw"], strict=True))
        least_ratio = min(times) / min(seconds["adamw"])
        peak = 0 if name == "adamw" else peak_extra_bytes(actions[name])
        results[name] = {
            **spread(times),
            "ratio_to_adamw": ratio,
            "ratio_of_least": least_ratio,
            "extra_peak_bytes": peak,
        }
        print(
            f"  {name:20s} {median(times):.3f} ({min(times):.3f}..{max(times):.3f})"
            f"  {ratio:5.2f}  {least_ratio:5.2f}  {peak / 2**20:6.1f}"
        )
    print("saved", save_report(arguments.output_dir, "step_cost", arguments, results))
    return results


if __name__ == "__main__":
    run_step_cost(*HfArgumentParser(StepCostArguments).parse_args_into_dataclasses())
