"""Bad batches that a guard finds in training, beside the loss and the gradient norm."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from hf_sketch import load_sketches
from hf_sketch.attribution.columns import column
from hf_sketch.attribution.questions.spikes import deviations_before
from hf_sketch.callbacks import GradientSketchCallback, GuardCallback
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.silent_training import silent_training
from hf_sketch.recipes.tables.training.guard_summary import GUARD, RULES, summary
from hf_sketch.recipes.tables.training.guard_tasks import (
    GuardTask,
    facts_task,
    labels_task,
    texts_task,
)
from hf_sketch.recipes.training_defaults import with_small

_WINDOW = 50
_WARM_UP = 900
_TINY: dict[str, Any] = {"seeds": "0", "steps": 72, "bursts": 1, "out_size": 64}


@dataclass
class GuardArguments(ReportArguments):
    """How many bad batches of training stand out before the optimizer sees them.

    labels: MiniLM on SNLI; texts: a small language model on WikiText; facts: a small
    language model that knows facts, which some documents contradict. Each run only
    notes what stands out, so that bad batches are trained on.
    """

    task: str = field(default="facts", metadata={"help": "labels, texts or facts."})
    seeds: str = field(default="1,2,3", metadata={"help": "Comma-separated runs."})
    steps: int = field(default=320, metadata={"help": "Optimizer steps per run."})
    batch_size: int = field(default=16, metadata={"help": "Examples per step."})
    bursts: int = field(default=8, metadata={"help": "Bad batches of each kind."})
    out_size: int = field(default=2048, metadata={"help": "Numbers per sketch."})
    train_file: str | None = field(
        default=None, metadata={"help": "SNLI rows, or texts; see docs/data.md."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "The same for the guard set."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model of texts."}
    )
    tiny: bool = field(default=False, metadata={"help": "A few steps, as a check."})


def task_of(arguments: GuardArguments, seed: int) -> GuardTask:
    """Return the task of a seed.

    Raises:
        ValueError: there is no such task, or texts have no model.
    """
    count = arguments.steps * arguments.batch_size
    files = {
        name: getattr(arguments, name) for name in ("train_file", "validation_file")
    }
    if arguments.task == "labels":
        return labels_task(count, seed, files)
    if arguments.task == "facts":
        return facts_task(count, seed, 1 if arguments.tiny else _WARM_UP)
    if arguments.task != "texts" or arguments.model_name_or_path is None:
        raise ValueError(
            f"task must be labels, texts or facts, got {arguments.task!r}; texts need "
            "--model_name_or_path, --train_file and --validation_file."
        )
    return texts_task(count, seed, files, arguments.model_name_or_path)


class _Clock:
    """Counts the CPU time of a guard within that of training."""

    def __init__(self, recorder: GradientSketchCallback, guard: GuardCallback) -> None:
        self.seconds, self._recorder = 0.0, recorder
        events: Any = guard
        for name in ("on_step_begin", "on_pre_optimizer_step"):
            setattr(events, name, self._timed(getattr(guard, name)))

    def watch_rows(self) -> None:
        """Count also what is done with each micro-batch's rows."""
        assert self._recorder.run is not None
        followers = self._recorder.run.followers
        followers[-1] = self._timed(followers[-1])

    def _timed(self, action: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = action(*args, **kwargs)
            self.seconds += time.process_time() - start
            return result

        return timed


class _Starts(TrainerCallback):
    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def on_train_begin(self, *event: Any, **kwargs: Any) -> None:
        self._clock.watch_rows()


@dataclass(frozen=True, eq=False)
class Planted:
    """The rows of a training, some of them bad.

    Shapes:
        kinds (steps,), bad (steps, batch)

    Args:
        rows: rows in order.
        kinds: name of each step's kind, "" if it is good.
        bad: which rows are.
    """

    rows: list[dict[str, Any]]
    kinds: np.ndarray[Any, Any]
    bad: np.ndarray[Any, Any]

    @classmethod
    def of(cls, task: GuardTask, arguments: GuardArguments, seed: int) -> "Planted":
        """Make some of a task's batches bad."""
        rng, batch = np.random.default_rng(seed), arguments.batch_size
        kinds = np.full(arguments.steps, "", dtype=object)
        late = np.arange(_WINDOW + 10, arguments.steps, 2)
        places = rng.permutation(late)[: arguments.bursts * len(task.kinds)]
        rows, bad = list(task.rows), np.zeros((arguments.steps, batch), bool)
        for place, step in enumerate(places.tolist()):
            kinds[step] = name = list(task.kinds)[place % len(task.kinds)]
            spoil, part = task.kinds[name]
            for own in rng.permutation(batch)[: round(part * batch)].tolist():
                rows[step * batch + own] = spoil(rows[step * batch + own], rng)
                bad[step, own] = True
        return cls(rows, kinds, bad)


def guarded_run(arguments: GuardArguments, seed: int) -> dict[str, Any]:
    """Plant, train once, and return what each step looked like.

    Returns:
        kinds (see `Planted`), deviations (by rule), named (parts of the named examples
        and of the bad ones that are both, of found steps), cost (the guard's CPU time
        as a part of all other CPU time of training).
    """
    task = task_of(arguments, seed)
    planted = Planted.of(task, arguments, seed)
    recorder = GradientSketchCallback(arguments.out_size)
    queries, rule = Dataset.from_list(task.guard), {"window": _WINDOW, "threshold": 4.0}
    guard = GuardCallback(queries, task.every, action="log", **rule)
    clock = _Clock(recorder, guard)
    with TemporaryDirectory() as directory:
        trainer = Trainer(
            task.model,
            _settings(directory, task, arguments, seed),
            train_dataset=Dataset.from_list(planted.rows),
            data_collator=task.collator,
            callbacks=[recorder, guard, _Starts(clock)],
        )
        start = time.process_time()
        trainer.train()
        cost = clock.seconds / (time.process_time() - start - clock.seconds)
        text = Path(directory, "guard.jsonl").read_text()
        norms = column(load_sketches(directory).steps, "gradient_norm")
    lines = [json.loads(line) for line in text.splitlines()]
    found = {
        name: np.array([line[f"{name}_deviation"] for line in lines], float)
        for name in GUARD
    }
    found["gradient_norm"] = deviations_before(norms, _WINDOW)
    found["gradient_norm"][:_WINDOW] = np.nan
    named = [
        _named(line, planted.bad)
        for line in lines
        if line["action"] and planted.bad[line["step"] - 1].any()
    ]
    return {"kinds": planted.kinds, "deviations": found, "named": named, "cost": cost}


def _settings(
    directory: str, task: GuardTask, arguments: GuardArguments, seed: int
) -> TrainingArguments:
    return silent_training(
        directory,
        seed,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=20,
    )


def _named(line: Mapping[str, Any], bad: np.ndarray[Any, Any]) -> dict[str, float]:
    """Return how well the examples that a found step names are the bad ones."""
    ids = np.array([one["example_id"] for one in line["examples"]])
    right = bad.flat[ids].sum()
    return {
        "part_of_bad": float(right / bad[line["step"] - 1].sum()),
        "part_of_named": float(right / len(ids)),
    }


def run_guard(arguments: GuardArguments) -> dict[str, Any]:
    """Plant, train, judge, print and save."""
    arguments = with_small(arguments, _TINY if arguments.tiny else {})
    saved = dataclasses.replace(
        arguments,
        **{
            name: Path(value).name
            for name in ("train_file", "validation_file", "model_name_or_path")
            if (value := getattr(arguments, name))
        },
    )
    runs: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    for seed in map(int, arguments.seeds.split(",")):
        runs.append(guarded_run(arguments, seed))
        print(f"seed {seed}: cost {runs[-1]['cost']:.3%}", flush=True)
        results = summary(runs)
        name = f"guard_{arguments.task}"
        print("saved", save_report(arguments.output_dir, name, saved, results))
    _print(results)
    return results


def _print(results: Mapping[str, Any]) -> None:
    for name in (*RULES, "guard"):
        for bar, one in results[name].items():
            parts = {k: v and round(v[0], 3) for k, v in one["found"].items()}
            print(f"{name} {bar}: false {one['false_alarms'][0]:.4f}, {parts}")
    print("named", results["part_of_bad"], results["part_of_named"])


if __name__ == "__main__":
    run_guard(*HfArgumentParser(GuardArguments).parse_args_into_dataclasses())
