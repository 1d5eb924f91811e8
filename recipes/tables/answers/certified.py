"""Whether certified rows are the exact top, and what finding them costs."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from hf_sketch import GradientRows, ModelSketch
from hf_sketch.recipes.saved_report import save_report
from hf_sketch.recipes.tables.models.exact_products import gradients
from hf_sketch.recipes.tables.quality.lds import task_of
from hf_sketch.recipes.tables.quality.lds_methods import sketched
from hf_sketch.recipes.tables.quality.lds_options import (
    LdsArguments,
    TaskArguments,
    of_task,
)
from hf_sketch.recipes.tables.quality.lds_training import Collate, Task, example_losses
from hf_sketch.recipes.tables.quality.removals import SETTINGS

_TINY = {"rows": 60, "queries": 4, "epochs": 1, "maps": 2, "out_sizes": "64"}
_EQUAL = 1e-9  # relative distance of scores that rounding explains
_SETTINGS = {**SETTINGS, "language": {"epochs": 3}}


@dataclass
class CertifiedArguments(TaskArguments):
    """Certified top rows beside the top of all exact scores.

    The trained model computes in float64 here: in float32, the gradient of a query
    whose loss is near 0 is rounding error, and so is the order of its exact scores.
    A trial is a query and a map of its own seed, `queries` / `maps` queries to a map.
    """

    task: str = field(
        default="digits", metadata={"help": "digits, snli_head or language."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder of a model, for language."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "SNLI rows, or texts for language."}
    )
    queries: int = field(default=200, metadata={"help": "Trials, of one query each."})
    maps: int = field(default=20, metadata={"help": "Maps of different seeds."})
    out_sizes: str = field(default="256,1024,4096", metadata={"help": "Sketch sizes."})
    layouts: str = field(default="grouped,blocked", metadata={"help": "Map layouts."})
    methods: str = field(default="dot,cosine", metadata={"help": "Scoring methods."})
    top_k: int = field(default=10, metadata={"help": "Rows per query."})
    confidence: float = field(default=0.99, metadata={"help": "As promised."})


@dataclass(frozen=True)
class Truth:
    """Exact scores of all rows.

    Shapes:
        dot, cosine (queries, rows)
    """

    dot: Tensor
    cosine: Tensor

    @classmethod
    def of(cls, task: Task, model: nn.Module) -> "Truth":
        """Compute them, one gradient after the other."""
        parameters = list(model.parameters())
        asked = torch.stack([*gradients(model, parameters, task.queries, task.collate)])
        dot = torch.empty(len(task.queries), len(task.rows), dtype=torch.float64)
        norms = torch.empty(len(task.rows), dtype=torch.float64)
        found = gradients(model, parameters, task.rows, task.collate)
        for place, gradient in enumerate(found):
            dot[:, place], norms[place] = asked @ gradient, gradient.norm()
        return cls(dot, dot / norms / asked.norm(dim=1, keepdim=True))


@dataclass(frozen=True, eq=False)
class Trials:
    """Trials on one task, model and setting."""

    task: Task
    model: nn.Module
    truth: Truth
    arguments: CertifiedArguments

    def run(self, method: str, out_size: int, layout: str) -> dict[str, Any]:
        """Count queries with a missing row, and the gradients that were computed."""
        parts = torch.arange(len(self.task.queries)).chunk(self.arguments.maps)
        missed, examined, computed = 0, [], []
        exact: Tensor = getattr(self.truth, method)
        for seed, some in enumerate(tqdm(parts, desc="Trials", unit="map")):
            rows = self._rows(out_size, layout, seed)
            found = self._certified(rows, some, method, seed)
            ids = torch.tensor(found.lines["example_id"][:]).view(len(some), -1)
            missed += int(is_missing(exact[some], ids).sum())
            examined += found.examined.tolist()
            computed.append(found.computed / len(self.task.rows))
        alone = torch.tensor(examined) / len(self.task.rows)
        return {
            "method": method,
            "out_size": out_size,
            "layout": layout,
            "trials": len(examined),
            "missed": missed,
            "examined_mean": float(alone.mean()),
            "examined_max": float(alone.max()),
            "computed_for_all_queries_of_a_map": sum(computed) / len(computed),
        }

    def seconds(self, out_size: int, layout: str) -> dict[str, float]:
        """Time one query with and without the sketches' help."""
        rows = self._rows(out_size, layout, 0)
        one = torch.tensor([0])
        sought = _timed(lambda: self._certified(rows, one, "dot", 0))
        count = len(self.task.rows)
        whole = _timed(lambda: self._certified(rows, one, "dot", 0, sample=count))
        return {"certified": sought, "all": whole, "ratio": sought / whole}

    def _rows(self, out_size: int, layout: str, seed: int) -> GradientRows:
        sketch = ModelSketch.from_model(self.model, out_size, layout, seed)
        return sketched(self.task, self.model, self.task.rows, sketch)

    def _certified(
        self, rows: GradientRows, some: Tensor, method: Any, seed: int, **options: Any
    ) -> Any:
        return rows.certified_top(
            self.model,
            self.task.rows,
            [self.task.queries[place] for place in some.tolist()],
            self.arguments.top_k,
            method=method,
            confidence=self.arguments.confidence,
            seed=seed,
            data_collator=self.task.collate,
            loss_fn=example_losses,
            **options,
        )


def is_missing(exact: Tensor, ids: Tensor) -> Tensor:
    """Return of each query whether a row outside has a greater score than one inside.

    Rows of equal examples have equal scores, of which any may be at the top.

    Shapes:
        exact (queries, rows), ids (queries, k) -> (queries,), bool
    """
    least = exact.gather(1, ids).amin(1)
    greatest = exact.scatter(1, ids, -torch.inf).amax(1)
    return greatest - least > _EQUAL * least.abs()


def run_certified(arguments: CertifiedArguments) -> dict[str, Any]:
    """Train, compare, print and save.

    Raises:
        ValueError: the task is unknown.
    """
    arguments = of_task(arguments, _TINY, _SETTINGS)
    model_name = {"model_name_or_path": arguments.model_name_or_path}
    task = task_of(LdsArguments(**arguments.shared, **model_name))
    model = task.train(torch.arange(len(task.rows)), 0)[-1].model.double()
    task.collate = partial(_in_float64, task.collate)
    trials = Trials(task, model, Truth.of(task, model), arguments)
    lines: list[dict[str, Any]] = []
    for layout in arguments.layouts.split(","):
        for out_size in map(int, arguments.out_sizes.split(",")):
            for method in arguments.methods.split(","):
                lines.append(trials.run(method, out_size, layout))
                print(lines[-1], flush=True)
    largest = max(map(int, arguments.out_sizes.split(",")))
    results = {
        "elements": sum(p.numel() for p in model.parameters()),
        "trials": sum(line["trials"] for line in lines),
        "missed": sum(line["missed"] for line in lines),
        "lines": lines,
        "seconds": trials.seconds(largest, arguments.layouts.split(",")[0]),
    }
    print(results["missed"], "of", results["trials"], "missed;", results["seconds"])
    name = f"certified_{arguments.task}"
    print("saved", save_report(arguments.output_dir, name, arguments, results))
    return results


def _in_float64(collate: Collate, examples: list[Any]) -> dict[str, Any]:
    """Collate, and make float64 of all floats."""
    inputs = collate(examples)
    floats = {name: x.double() for name, x in inputs.items() if x.is_floating_point()}
    return {**inputs, **floats}


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    run_certified(*HfArgumentParser(CertifiedArguments).parse_args_into_dataclasses())
