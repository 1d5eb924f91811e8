"""What a sketched Hessian-vector product costs beside a plain one, and eigenvalues."""

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser

from hf_sketch import HessianOperator, ModelSketch, SketchedHessian
from hf_sketch.recipes.placement import device
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.costs.eigenvalue_runs import compare_eigenvalues
from hf_sketch.recipes.tables.measure import peak_extra_bytes, spread, timed
from hf_sketch.recipes.tables.models.gradients import fine_tuned_minilm
from hf_sketch.recipes.tables.models.hessians import entailment_batches, random_tokens

_NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
_TINY = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 300}
_MODES = ("autograd", "finite_difference")
PEERS = ("hessian_eigenthings", "curvlinops")


@dataclass
class HvpCostArguments(ReportArguments):
    """Time and memory of Hessian-vector products, plain and sketched, by mode."""

    operators: str = field(
        default="affd,srht", metadata={"help": "Operators, comma-separated."}
    )
    bits: int = field(default=14, metadata={"help": "log2 of the sketch size."})
    examples: int = field(default=8, metadata={"help": "Examples of the batch."})
    tokens: int = field(default=128, metadata={"help": "Tokens of each."})
    rounds: int = field(default=3, metadata={"help": "Rounds, after one not counted."})
    top: int = field(default=10, metadata={"help": "Eigenvalues, beside the peers."})
    exact_steps: int = field(
        default=60, metadata={"help": "Lanczos steps of their yardstick."}
    )
    fine_tuning_steps: int = field(
        default=100,
        metadata={"help": "Training steps of MiniLM, before its eigenvalues."},
    )
    tiny: bool = field(
        default=False, metadata={"help": "A small model and one round, as a check."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "SNLI rows instead of our own pairs."}
    )


def causal_model(**config: Any) -> torch.nn.Module:
    """GPT-2 with random weights and without dropout."""
    torch.manual_seed(0)
    configuration = AutoConfig.for_model("gpt2", **_NO_DROPOUT, **config)
    return AutoModelForCausalLM.from_config(configuration).eval().to(device())


def products(
    model: torch.nn.Module, arguments: HvpCostArguments
) -> dict[str, Callable[[], Any]]:
    """What is measured, by name: the gradient, and products in each mode."""
    batches = random_tokens(model, arguments.examples, arguments.tokens)
    actions: dict[str, Callable[[], Any]] = {}
    for mode in _MODES:
        hessian = HessianOperator(model, batches, mode=mode, self_check=False)
        direction = {n: torch.randn_like(p) for n, p in hessian.parameters.items()}
        if mode == _MODES[0]:
            actions["gradient"] = hessian.gradient
        actions[f"{mode}, plain"] = partial(hessian.__matmul__, direction)
        for operator in arguments.operators.split(","):
            sketch = ModelSketch.from_model(
                model, 2**arguments.bits, "blocked", 0, operator
            )
            vector = torch.randn(sketch.out_size, device=device())
            sketched = SketchedHessian(hessian, sketch)
            actions[f"{mode}, {operator}"] = partial(sketched.__matmul__, vector)
    return actions


def measure_products(arguments: HvpCostArguments) -> dict[str, dict[str, Any]]:
    """Times, their ratios to the plain product of the mode, and peaks."""
    model = causal_model(**(_TINY if arguments.tiny else {}))
    actions = products(model, arguments)
    seconds = timed(actions, arguments.rounds)
    costs: dict[str, dict[str, Any]] = {}
    for name, times in seconds.items():
        cost: dict[str, Any] = spread(times)
        mode = name.split(",")[0]
        if mode in _MODES:
            pairs = zip(times, seconds[f"{mode}, plain"], strict=True)
            ratios = [one / plain for one, plain in pairs]
            cost["ratio_to_plain"] = median(ratios)
            cost["ratios"] = ratios
        cost["extra_peak_bytes"] = peak_extra_bytes(actions[name])
        costs[name] = cost
    return costs


def run_hvp_cost(arguments: HvpCostArguments) -> dict[str, Any]:
    """Measure, print and save."""
    if arguments.tiny:
        arguments = dataclasses.replace(
            arguments,
            rounds=1,
            bits=8,
            examples=2,
            tokens=16,
            top=1,
            exact_steps=2,
            fine_tuning_steps=1,
        )
    costs = measure_products(arguments)
    gradient = costs["gradient"]["extra_peak_bytes"]
    print(
        f"{arguments.examples} x {arguments.tokens} tokens, out_size 2^{arguments.bits}"
    )
    for name, cost in costs.items():
        ratio = cost.get("ratio_to_plain")
        times = "" if ratio is None else f" {ratio:.3f} times the plain one"
        print(
            f"  {name:25s} {cost['median_seconds']:8.3f} s{times}; peak "
            f"{cost['extra_peak_bytes'] / 2**20:.0f} MiB, "
            f"{cost['extra_peak_bytes'] / gradient:.2f} of a gradient's"
        )
    results: dict[str, Any] = {"products": costs}
    save_report(arguments.output_dir, "hvp_cost", arguments, results)
    peers = [name for name in PEERS if importlib.util.find_spec(name) is not None]
    results["eigenvalues"] = compare_eigenvalues(
        fine_tuned_minilm(arguments.fine_tuning_steps, 0, arguments.train_file),
        entailment_batches(16, 16, arguments.train_file),
        arguments.top,
        arguments.exact_steps,
        peers,
    )
    print("saved", save_report(arguments.output_dir, "hvp_cost", arguments, results))
    return results


if __name__ == "__main__":
    run_hvp_cost(*HfArgumentParser(HvpCostArguments).parse_args_into_dataclasses())
