"""The noise scale and the largest eigenvalue beside a sweep of batches and rates."""

import dataclasses
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from transformers import HfArgumentParser, Trainer, set_seed

from hf_sketch import (
    HessianOperator,
    ModelSketch,
    SketchedHessian,
    hessian_spectrum,
    load_sketches,
)
from hf_sketch.attribution.columns import column
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.quality.lds_tasks import Digits, SnliHead
from hf_sketch.recipes.tables.silent_training import silent_training

_TARGETS = {"digits": 0.2, "snli_head": 0.6}
_RECORDED_BATCH = 8
_LOOKS = 1.05  # from one look at the loss of all rows to the next, in steps
_WORST = 50.0  # a loss that is not waited for any longer
_TINY = {
    "tasks": "digits",
    "seeds": "0",
    "batches": "16,64",
    "log_rates": "-3,-2",
    "still_steps": 40,
    "out_size": 256,
}


@dataclass
class NoiseSweepArguments(ReportArguments):
    """Noise scales and stable rates, beside exact gradients and a sweep, by plain SGD.

    digits: a perceptron; snli_head: a head on the frozen MiniLM, of our own pairs. For
    each batch size, the fewest steps to a loss over all rows are found over learning
    rates. The measured critical batch is the fewest examples over the fewest steps.
    """

    tasks: str = field(default="digits", metadata={"help": "Comma-separated."})
    seeds: str = field(default="0,1", metadata={"help": "Comma-separated."})
    rows: int = field(default=1024, metadata={"help": "Rows to train on."})
    batches: str = field(
        default="1,2,4,8,16,32,64,128,256,512,1024",
        metadata={"help": "Batch sizes, comma-separated."},
    )
    log_rates: str = field(
        default="-9,-8,-7,-6,-5,-4,-3,-2,-1,0,1,2",
        metadata={"help": "log2 of the learning rates, comma-separated."},
    )
    most_examples: int = field(
        default=100_000, metadata={"help": "Examples after which a run gives up."}
    )
    out_size: int = field(default=4096, metadata={"help": "Numbers per sketch."})
    still_steps: int = field(
        default=250, metadata={"help": "Steps at one point, beside exact gradients."}
    )
    tiny: bool = field(default=False, metadata={"help": "A few runs, as a check."})


@dataclass(frozen=True, eq=False)
class SweepTask:
    """A model and all of its data in two tensors.

    Args:
        name: name of the task.
        x: features of all rows, (rows, width).
        labels: labels of all rows, (rows,).
        new_model: makes the model.
    """

    name: str
    x: Tensor
    labels: Tensor
    new_model: Any

    @classmethod
    def of_name(cls, name: str, rows: int) -> "SweepTask":
        """Load a task."""
        task = {"digits": Digits, "snli_head": SnliHead}[name](rows, 1, 1)
        x = torch.stack([row["x"] for row in task.rows])
        labels = torch.stack([row["labels"] for row in task.rows])
        return cls(name, x, labels, task.new_model)

    def loss(self, model: nn.Module, own: Tensor | slice = slice(None)) -> Tensor:
        """Return the mean loss of some rows."""
        return model(x=self.x[own], labels=self.labels[own])["loss"]

    def exact(self, model: nn.Module) -> tuple[float, float]:
        """Return tr(Sigma) and |G|^2 by the gradient of every row."""
        parameters = {n: p.detach() for n, p in model.named_parameters()}

        def loss(parameters: Any, x: Tensor, label: Tensor) -> Tensor:
            given = {"x": x[None], "labels": label[None]}
            return functional_call(model, parameters, (), given)["loss"]

        own = vmap(grad(loss), (None, 0, 0))
        square, total = 0.0, 0.0
        for part in range(0, len(self.x), 128):
            place = slice(part, part + 128)
            found = own(parameters, self.x[place], self.labels[place])
            rows = torch.cat([one.flatten(1) for one in found.values()], 1).double()
            square, total = square + float(rows.square().sum()), total + rows.sum(0)
        count = len(self.x)
        signal = float((total / count).square().sum())
        return (square / count - signal) * count / (count - 1), signal


def steps_to(
    task: SweepTask, model: nn.Module, batch: int, rate: float, seed: int, most: int
) -> int | None:
    """Train by SGD; return the steps to the task's loss, None if it is not reached."""
    generator = torch.Generator().manual_seed(seed)
    parameters, order, look = list(model.parameters()), torch.empty(0), 1.0
    for step in range(1, most + 1):
        if len(order) < batch:
            order = torch.randperm(len(task.x), generator=generator)
        own, order = order[:batch], order[batch:]
        gradients = torch.autograd.grad(task.loss(model, own), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=rate)
            if step < look:
                continue
            look = max(step + 1, step * _LOOKS)
            loss = float(task.loss(model))
        if not loss < _WORST:
            return None
        if loss < _TARGETS[task.name]:
            return step
    return None


def sweep(task: SweepTask, arguments: NoiseSweepArguments, seed: int) -> dict[str, Any]:
    """Return the fewest steps of each batch size, and all that was tried."""
    rates = [2.0 ** int(power) for power in arguments.log_rates.split(",")]
    best: dict[int, dict[str, Any]] = {}
    for batch in map(int, arguments.batches.split(",")):
        tried: dict[float, int | None] = {}
        most = max(200, arguments.most_examples // batch)
        for rate in rates:
            set_seed(seed)
            fewest = min([most, *(steps for steps in tried.values() if steps)])
            tried[rate] = steps_to(
                task, task.new_model(), batch, rate, seed, 2 * fewest
            )
        reached = {rate: steps for rate, steps in tried.items() if steps}
        if reached:
            rate = min(reached, key=reached.__getitem__)
            found = {"steps": reached[rate], "rate": rate, "largest": max(reached)}
            best[batch] = {**found, "tried": list(tried.items())}
            print(f"  batch {batch}: {found}", flush=True)
    fewest_steps = min(found["steps"] for found in best.values())
    fewest_examples = min(batch * found["steps"] for batch, found in best.items())
    return {
        "best": best,
        "critical_batch": fewest_examples / fewest_steps,
        "best_rate": best[max(best)]["rate"],
        "largest_rate": best[max(best)]["largest"],
    }


def recorded(
    task: SweepTask,
    model: nn.Module,
    rate: float,
    steps: int,
    out_size: int,
    seed: int,
) -> Any:
    """Train by the Trainer at a constant rate, and return the noise of its steps."""
    rows = Dataset.from_dict({"x": task.x.tolist(), "labels": task.labels.tolist()})
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            silent_training(
                folder,
                seed,
                max_steps=steps,
                per_device_train_batch_size=_RECORDED_BATCH,
                learning_rate=rate,
                lr_scheduler_type="constant",
                optim="sgd",
                max_grad_norm=0.0,
            ),
            train_dataset=rows,
            callbacks=[GradientSketchCallback(out_size, measure_error=False)],
        )
        trainer.train()
        lines = load_sketches(folder).noise_scale(window=max(10, steps))
        return {name: column(lines, name) for name in lines.column_names}


def stable_rate(task: SweepTask, model: nn.Module, seed: int) -> float:
    """Return the rate at which plain SGD on all rows stops being stable here."""
    sketch = ModelSketch.from_model(model, 1024, "blocked", seed)
    batch = {"x": task.x, "labels": task.labels}
    # Finite differences see the kinks of ReLU, autograd does not.
    hessian = HessianOperator(model, [batch], self_check=False)
    operator = SketchedHessian(hessian, sketch)
    spectrum = hessian_spectrum(operator, 40, seed=seed, progress=False)
    return spectrum.stable_learning_rate()


def judged(
    task: SweepTask, arguments: NoiseSweepArguments, seed: int, swept: dict[str, Any]
) -> dict[str, Any]:
    """Return what a recorded run advises, and how exact its estimates are."""
    set_seed(seed)
    model, out_size = task.new_model(), arguments.out_size
    rates = [stable_rate(task, model, seed)]
    at_eight = swept["best"].get(_RECORDED_BATCH) or next(iter(swept["best"].values()))
    steps, rate = at_eight["steps"], at_eight["rate"]
    path = recorded(task, model, rate, steps, out_size, seed)
    rates.append(stable_rate(task, model, seed))
    exact = {}
    for when, point in (("start", None), ("end", model)):
        set_seed(seed)
        point = task.new_model() if point is None else point
        noise, signal = task.exact(point)
        still = recorded(task, point, 0.0, arguments.still_steps, out_size, seed)
        exact[when] = {
            "exact": [noise, signal, noise / signal],
            "found": [
                float(np.mean(still["noise"])),
                float(np.mean(still["signal"])),
                float(still["noise_scale"][-1]),
            ],
            "interval": [float(still["low"][-1]), float(still["high"][-1])],
        }
    return {
        "noise_scale": float(path["noise_scale"][-1]),
        "interval": [float(path["low"][-1]), float(path["high"][-1])],
        "stable_rates": rates,
        "exact": exact,
    }


def run_noise_sweep(arguments: NoiseSweepArguments) -> dict[str, Any]:
    """Measure, print and save."""
    if arguments.tiny:
        arguments = dataclasses.replace(arguments, **_TINY)
    results: dict[str, Any] = {}
    for name in arguments.tasks.split(","):
        task = SweepTask.of_name(name, arguments.rows)
        for seed in map(int, arguments.seeds.split(",")):
            swept = sweep(task, arguments, seed)
            found = {**swept, **judged(task, arguments, seed, swept)}
            results[f"{name}-{seed}"] = found
            print(
                f"{name}, seed {seed}: noise scale {found['noise_scale']:.3g} "
                f"({found['interval']}), critical batch {found['critical_batch']:.3g}; "
                f"stable rates {found['stable_rates']}, best {found['best_rate']}, "
                f"largest {found['largest_rate']}; exact {found['exact']}",
                flush=True,
            )
    name = f"noise_sweep_{arguments.tasks.replace(',', '_')}"
    print("saved", save_report(arguments.output_dir, name, arguments, results))
    return results


if __name__ == "__main__":
    run_noise_sweep(
        *HfArgumentParser(NoiseSweepArguments).parse_args_into_dataclasses()
    )
