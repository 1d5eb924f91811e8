"""How well the ledger of training balances, what it finds, and what it costs."""

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_sketch import ModelSketch, load_updates, verify_training
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.callbacks.recording.weights import WeightLedger
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.measure import spread, timed
from hf_sketch.recipes.tables.models.language_model import random_language_model
from hf_sketch.recipes.tables.training.altered_ledgers import (
    DEEDS,
    Alteration,
    altered_store,
)
from hf_sketch.recipes.texts.country_facts import country_documents, word_tokenizer

_TINY = {"steps": 40, "seeds": "0", "trials": 8, "nudges": 2, "rounds": 1}
_PLACE = {"epoch": 0, "step": 1, "learning_rate": 0.0}
_CHECKPOINTS = 10
_NUDGED_STEPS = 20
_SIZES = (1e-6, 1.0)  # of an alteration, in units of its row's norm


@dataclass
class LedgerArguments(ReportArguments):
    """Residuals of a ledger, what it finds of alterations, and its cost.

    A language model of 0.4M parameters learns sentences by AdamW, with clipping, in
    float32 and in bfloat16.
    """

    steps: int = field(default=10_000, metadata={"help": "Optimizer steps per run."})
    seeds: str = field(default="0,1", metadata={"help": "Comma-separated runs."})
    out_size: int = field(default=1024, metadata={"help": "Numbers per sketch."})
    trials: int = field(default=200, metadata={"help": "Altered ledgers."})
    nudges: int = field(
        default=40, metadata={"help": "Short runs in which somebody changes a weight."}
    )
    rounds: int = field(default=7, metadata={"help": "Rounds of the timing."})
    model_type: str = field(
        default="gpt2", metadata={"help": "Model whose steps are timed."}
    )
    cost_only: bool = field(
        default=False, metadata={"help": "Time steps alone, into ledger_cost.json."}
    )
    tiny: bool = field(default=False, metadata={"help": "A few steps, as a check."})


class Nudge(TrainerCallback):
    """Changes a weight after a step, as nobody should."""

    def __init__(self, step: int, size: float) -> None:
        self.step, self.size = step, size

    def on_step_end(self, *event: Any, **kwargs: Any) -> None:
        if event[1].global_step == self.step:
            with torch.no_grad():
                next(kwargs["model"].parameters())[0, 0] += self.size


def train(
    directory: Path,
    steps: int,
    seed: int,
    dtype: torch.dtype,
    out_size: int | None,
    *callbacks: TrainerCallback,
) -> nn.Module:
    """Train once, with a ledger if it has a size, and checkpoints from the start on."""
    texts = country_documents()["text"][:]
    tokenizer = word_tokenizer(texts)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 128, "n_positions": 32}
    set_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).to(dtype)
    own = [*callbacks]
    if out_size is not None:
        settings = {"per_example": False, "per_step": False, "updates": True}
        own.append(GradientSketchCallback(out_size, **settings))
    shutil.rmtree(directory, ignore_errors=True)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(directory),
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            weight_decay=0.01,
            save_steps=max(1, steps // _CHECKPOINTS),
            save_only_model=True,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=seed,
            dataloader_pin_memory=torch.accelerator.is_available(),
        ),
        train_dataset=Dataset.from_list([dict(tokenizer(text)) for text in texts]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=own,
    )
    trainer.save_model(str(directory / "checkpoint-0"))
    trainer.train()
    return model


def checkpoint(directory: Path, place: int, steps: int) -> Path:
    """Return the folder of a checkpoint, of which the first is that of no step."""
    return directory / f"checkpoint-{place * (steps // _CHECKPOINTS)}"


def residuals(directory: Path, steps: int) -> dict[str, Any]:
    """Return the residuals over the whole run, and between neighbors."""
    ends = [checkpoint(directory, place, steps) for place in range(_CHECKPOINTS + 1)]
    whole = verify_training(directory, ends[0], ends[-1])
    parts = [verify_training(directory, *pair) for pair in pairwise(ends)]
    return {
        "steps": whole.last_step,
        "change": whole.change,
        "residual": whole.residual,
        "greatest_of_parts": max(part.residual for part in parts),
        "problems": sum(len(check.problems) for check in (whole, *parts)),
    }


def trial(directory: Path, copy: Path, steps: int, seed: int) -> dict[str, Any]:
    """Alter one row of a ledger; return what was done, and what is found."""
    rng = np.random.default_rng(seed)
    first, last = sorted(rng.choice(_CHECKPOINTS + 1, 2, replace=False).tolist())
    each = steps // _CHECKPOINTS
    step = int(rng.integers(first * each + 1, last * each))
    low, high = map(math.log, _SIZES)
    size = math.exp(rng.uniform(low, high))
    deed = DEEDS[seed % len(DEEDS)]
    renumbered = bool(rng.integers(2))
    # The first row begins the run, so a step's place is its number.
    alteration = Alteration(deed, step, size, renumbered, seed)
    altered_store(directory, copy, alteration)
    ends = (checkpoint(directory, place, steps) for place in (first, last))
    problems = verify_training(copy, *ends).problems
    return {
        **dataclasses.asdict(alteration),
        "found": bool(problems),
        "located": any(names(problem, step) for problem in problems),
    }


def names(problem: str, step: int) -> bool:
    """Return whether a problem names a step, or the one whose row follows it."""
    words = problem.replace(".", " ").split()
    return any(str(number) in words for number in (step, step + 1))


def control(directory: Path, steps: int, seed: int) -> int:
    """Return how many problems a sound ledger has between two of its checkpoints."""
    rng = np.random.default_rng(seed)
    places = sorted(rng.choice(_CHECKPOINTS + 1, 2, replace=False).tolist())
    ends = (checkpoint(directory, place, steps) for place in places)
    return len(verify_training(directory, *ends).problems)


def nudged(directory: Path, out_size: int, seed: int) -> dict[str, Any]:
    """Change one weight in a short run; return whether that is found, and where."""
    rng = np.random.default_rng(seed)
    step = int(rng.integers(1, _NUDGED_STEPS - 1))
    size = 10.0 ** float(rng.uniform(-6, -2))
    nudge = Nudge(step, size)
    train(directory, _NUDGED_STEPS, seed, torch.float32, out_size, nudge)
    ends = (checkpoint(directory, place, _NUDGED_STEPS) for place in (0, _CHECKPOINTS))
    problems = verify_training(directory, *ends).problems
    located = any(f"after step {step}, and not by" in problem for problem in problems)
    return {"step": step, "size": size, "located": located}


def costs(model_type: str, tiny: bool, rounds: int) -> dict[str, Any]:
    """Time an AdamW step, the sketch of a gradient, and the rows of a ledger."""
    model = random_language_model(model_type, tiny)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-5, foreach=True)
    actions: dict[str, Callable[[], Any]] = {"adamw": optimizer.step}
    for layout in ("grouped", "blocked"):
        sketch = ModelSketch.from_model(model, 4096, layout)
        ledger = WeightLedger(sketch, model, lambda *row: None)
        ledger.start_run(0, 0)
        actions |= {
            f"gradient, {layout}": partial(sketch.sketch, gradients),
            f"update, {layout}": partial(ledger.record, _PLACE, True),
            f"comparison, {layout}": partial(ledger.record, _PLACE, False),
        }
    seconds = timed(actions, rounds)
    return {
        name: {
            **spread(times),
            "ratio_to_adamw": median(
                a / b for a, b in zip(times, seconds["adamw"], strict=True)
            ),
        }
        for name, times in seconds.items()
    }


def bit_equal(directory: Path, steps: int, out_size: int) -> bool:
    """Return whether a ledger leaves training as it is, bit for bit."""
    plain, watched = (
        train(directory / str(size), steps, 0, torch.float32, size)
        for size in (None, out_size)
    )
    pairs = zip(plain.parameters(), watched.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def run_ledger(arguments: LedgerArguments) -> dict[str, Any]:
    """Measure, print and save."""
    if arguments.tiny:
        arguments = dataclasses.replace(arguments, **_TINY)
    output, results = arguments.output_dir, dict[str, Any]()
    if arguments.cost_only or arguments.tiny:
        cost = costs(arguments.model_type, arguments.tiny, arguments.rounds)
        for name, found in cost.items():
            print(f"  {name:20s} {found['ratio_to_adamw']:.2f} AdamW steps")
        print("saved", save_report(output, "ledger_cost", arguments, cost))
        results["cost"] = cost
    if not arguments.cost_only:
        with TemporaryDirectory() as folder:
            results |= _results(Path(folder), arguments)
        print("saved", save_report(output, "ledger", arguments, results))
    return results


def _results(folder: Path, arguments: LedgerArguments) -> dict[str, Any]:
    steps, out_size = arguments.steps, arguments.out_size
    results: dict[str, Any] = {"residuals": list(_runs(folder, arguments))}
    run = folder / f"float32-{arguments.seeds.split(',')[0]}"
    trials = [
        trial(run, folder / "copy", steps, seed) for seed in range(arguments.trials)
    ]
    alarms = [control(run, steps, seed) > 0 for seed in range(arguments.trials)]
    results |= {"trials": trials, "false_alarms": sum(alarms)}
    for what in ("found", "located"):
        print(f"{what}: {sum(t[what] for t in trials)} of {len(trials)} altered rows")
    print(f"false alarms: {sum(alarms)} of {len(alarms)}", flush=True)
    nudges = [nudged(folder / "nudged", out_size, s) for s in range(arguments.nudges)]
    print(f"located: {sum(n['located'] for n in nudges)} of {len(nudges)} nudges")
    equal = bit_equal(folder / "equal", min(steps, 200), out_size)
    print(f"training is bit for bit the same: {equal}", flush=True)
    return results | {"nudges": nudges, "bit_equal": equal}


def _runs(folder: Path, arguments: LedgerArguments) -> Iterator[dict[str, Any]]:
    """Train every run, and yield its residuals."""
    for dtype in ("float32", "bfloat16"):
        for seed in map(int, arguments.seeds.split(",")):
            run = folder / f"{dtype}-{seed}"
            train(run, arguments.steps, seed, getattr(torch, dtype), arguments.out_size)
            found = residuals(run, arguments.steps)
            rows = len(load_updates(run))
            print(f"{dtype} {seed}: {found}, {rows} rows", flush=True)
            yield {"dtype": dtype, "seed": seed, **found}


if __name__ == "__main__":
    run_ledger(*HfArgumentParser(LedgerArguments).parse_args_into_dataclasses())
