"""Inner products of Adam-normalized gradients: exact, of rank-one moments, sketched.

What `GradientSketchCallback(normalize="adam")` records is the last. With `--lora_rank`,
only adapters train, as in LESS (Xia et al. 2024), which ranks by the cosine.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_sketch import ModelSketch, Normalizer
from hf_sketch.examples.measured_error import top_found
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.models.gradient_tasks import GradientTask, language_task

_ELEMENTS_AT_ONCE = 2**22
_TOP = 10

Scale = Callable[[str, Tensor], Tensor]


@dataclass
class AdamGeometryArguments(ReportArguments):
    """How well rows in Adam's geometry keep its inner products and rankings."""

    task: str = field(
        default="masked", metadata={"help": "masked or causal; see table6."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Language model; by default MiniLM, masked."}
    )
    text_file: str | None = field(
        default=None, metadata={"help": "Passages; by default our own pairs."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens kept per passage."})
    examples: int = field(default=48, metadata={"help": "Gradients to compare."})
    steps: int = field(default=60, metadata={"help": "AdamW steps beforehand."})
    lora_rank: int = field(default=0, metadata={"help": "Rank of LoRA; 0 for none."})
    out_size: int = field(default=4096, metadata={"help": "Numbers per sketch."})
    layout: str = field(default="grouped", metadata={"help": "Layout of the map."})
    seeds: int = field(default=3, metadata={"help": "Seeds of the map."})


def run(arguments: AdamGeometryArguments) -> dict[str, dict[str, list[float]]]:
    """Measure, print and save.

    Returns:
        by kind of product ("plain gradients", "rank-one moments", "sketches"):
        pearson_r with the exact products of different examples, the share of the exact
        top 10 found, and the same of cosines; one number per seed for sketches.
    """
    task = language_task(
        arguments.task == "masked",
        arguments.model_name_or_path,
        arguments.text_file,
        arguments.max_length,
        arguments.examples,
        arguments.steps,
        partial(_with_adapters, rank=arguments.lora_rank),
    )
    results = measure(task, arguments)
    for kind, figures in results.items():
        lines = (f"{k} {', '.join(f'{x:.4f}' for x in v)}" for k, v in figures.items())
        print(f"{kind:18s} {'; '.join(lines)}")
    rank = f"_lora{arguments.lora_rank}" if arguments.lora_rank else ""
    name = f"adam_geometry_{arguments.task}{rank}"
    print("saved", save_report(arguments.output_dir, name, arguments, results))
    return results


def measure(
    task: GradientTask, arguments: AdamGeometryArguments
) -> dict[str, dict[str, list[float]]]:
    """Return what `run` saves, for a fine-tuned model."""
    assert task.optimizer is not None
    trained = {n: p for n, p in task.model.named_parameters() if p.requires_grad}
    normalizer = Normalizer.from_optimizer(task.model, task.optimizer)
    roots = _roots(task, trained)
    scales: dict[str, Scale] = {
        "exact": lambda name, rows: rows / roots[name],
        "plain gradients": lambda name, rows: rows,
        "rank-one moments": normalizer.scale,
    }
    size, layout = arguments.out_size, arguments.layout
    sketches = [
        ModelSketch.from_model(task.model, size, layout, seed, "srht", normalizer)
        for seed in range(arguments.seeds)
    ]
    products: dict[str, Tensor | float] = dict.fromkeys(scales, 0.0)
    sketched = [torch.zeros(len(task.examples), size) for _ in sketches]
    for rows in _gradients(task, trained):
        for kind, scale in scales.items():
            for name, part in rows.items():
                scaled = scale(name, part)
                products[kind] = products[kind] + (scaled @ scaled.T).double()
        for total, sketch in zip(sketched, sketches, strict=True):
            total += sketch.sketch_rows(rows)
    exact, *others = (torch.as_tensor(x) for x in products.values())
    kinds = list(scales)[1:]
    results = {k: _figures(exact, [x]) for k, x in zip(kinds, others, strict=True)}
    results["sketches"] = _figures(exact, [(x @ x.T).double() for x in sketched])
    return results


def _with_adapters(model: Any, rank: int) -> nn.Module:
    """LoRA on all linear layers, if it has a rank."""
    if not rank:
        return model
    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))


def _roots(
    task: GradientTask, trained: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """sqrt(v) + eps of every element, as Adam divides by it.

    Infinite where v is zero: embeddings of tokens that fine-tuning has not seen.
    """
    assert task.optimizer is not None
    (group,) = task.optimizer.param_groups
    found: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        state = task.optimizer.state[parameter]
        unbiased = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"].item())
        root = unbiased.sqrt() + group["eps"]
        found[name] = root.where(unbiased > 0, torch.inf).flatten()
    return found


def _gradients(
    task: GradientTask, trained: Mapping[str, nn.Parameter]
) -> Iterator[dict[str, Tensor]]:
    """Yield all examples' gradients of some parameters at a time, by name."""
    names = list(trained)
    while names:
        some, size = [names.pop(0)], 0
        while names and size + trained[names[0]].numel() < _ELEMENTS_AT_ONCE:
            some.append(names.pop(0))
            size += trained[some[-1]].numel()
        parts: list[tuple[Tensor, ...]] = []
        for example in tqdm(task.examples, desc=f"Gradients of {some[0]}"):
            loss = task.model(**example)["loss"]
            parts.append(torch.autograd.grad(loss, [trained[name] for name in some]))
        columns = zip(*parts, strict=True)
        stacked = (torch.stack([x.flatten() for x in column]) for column in columns)
        yield dict(zip(some, stacked, strict=True))


def _figures(exact: Tensor, products: list[Tensor]) -> dict[str, list[float]]:
    """Compare products of each with each, and their cosines, with the exact ones."""
    figures: dict[str, list[float]] = {}
    for found in products:
        for kind, ours, theirs in (
            ("", found, exact),
            ("cosine_", _cosines(found), _cosines(exact)),
        ):
            pairs = torch.triu_indices(len(exact), len(exact), offset=1).unbind()
            r = torch.corrcoef(torch.stack([theirs[pairs], ours[pairs]]))[0, 1]
            top = top_found(theirs, ours, min(_TOP, len(exact) - 1))
            figures.setdefault(f"{kind}pearson_r", []).append(float(r))
            figures.setdefault(f"{kind}top_found", []).append(top)
    return figures


def _cosines(products: Tensor) -> Tensor:
    norms = products.diagonal().sqrt()
    norms = norms.where(norms > 0, 1)  # a passage without a masked token
    return products / torch.outer(norms, norms)


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(
        AdamGeometryArguments  # type: ignore[arg-type]
    ).parse_args_into_dataclasses()
    run(arguments)
