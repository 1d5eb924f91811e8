"""Spikes of training that were planted: which are found, and whom they name."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Trainer,
    set_seed,
)

from hf_sketch import GradientRows, load_sketches
from hf_sketch.attribution.columns import column
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.silent_training import silent_training
from hf_sketch.recipes.texts.country_facts import country_documents, word_tokenizer
from hf_sketch.recipes.texts.entailment import LABELS, load_pairs, tokenize
from hf_sketch.recipes.texts.minilm import embedded_model_path, new_model

_THRESHOLDS = (4.0, 5.0, 6.0, 8.0, 10.0, 15.0)
_BATCH = 16
_HALF = 0.5  # of the planted examples of a batch
_AFTER = 3  # steps on which a planted step may still be felt
_NEAREST = 6  # steps between two planted ones
Row = dict[str, Any]


@dataclass
class PlantedSpikesArguments(ReportArguments):
    """How many planted spikes of training are found, and whom they name.

    labels: MiniLM learns 480 pairs by heart; some batches have wrong labels.
    texts: a small language model learns sentences; some batches have texts of random
    words. Besides the shares of the gradient, the loss, the gradient's norm and chance
    name the same number of examples. The defaults of `find_spikes` were chosen
    on seed 0.
    """

    task: str = field(default="labels", metadata={"help": "labels or texts."})
    seeds: str = field(default="1,2,3,4,5", metadata={"help": "Comma-separated runs."})
    steps: int = field(default=240, metadata={"help": "Optimizer steps per run."})
    bursts: int = field(default=8, metadata={"help": "Planted batches per run."})
    planted: int = field(
        default=8, metadata={"help": f"Examples made bad, of the {_BATCH} of a batch."}
    )
    out_size: int = field(default=1024, metadata={"help": "Numbers per sketch."})
    tiny: bool = field(default=False, metadata={"help": "A few steps, as a check."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "SNLI rows for labels; by default our own pairs."},
    )


@dataclass(frozen=True)
class SpikeTask:
    """A model, its data, and how a row is made bad.

    Args:
        rows: the model's inputs.
        spoil: returns a bad row in place of a good one.
        new_model: makes the model.
        collator: makes a batch.
        learning_rate: learning rate of AdamW, without decay.
    """

    rows: list[Row]
    spoil: Callable[[Row, np.random.Generator], Row]
    new_model: Callable[[], nn.Module]
    collator: Any
    learning_rate: float


def labels_task(rows: int, train_file: str | None = None) -> SpikeTask:
    """Return pairs of SNLI, or our own, whose bad rows have another label."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    pairs = load_pairs("train", train_file).select(range(rows))
    pairs = tokenize(pairs, tokenizer, 64)
    names = ("input_ids", "attention_mask", "label")
    inputs: list[Row] = pairs.select_columns(names).to_list()

    def spoil(row: Row, rng: np.random.Generator) -> Row:
        return {**row, "label": (row["label"] + rng.integers(1, 3)) % len(LABELS)}

    return SpikeTask(inputs, spoil, new_model, DataCollatorWithPadding(tokenizer), 1e-4)


def texts_task() -> SpikeTask:
    """Return sentences about countries, whose bad rows are random words."""
    texts = country_documents()["text"][:]
    tokenizer = word_tokenizer(texts)
    special = len(tokenizer.all_special_ids)

    def spoil(row: Row, rng: np.random.Generator) -> Row:
        ids = rng.integers(special, len(tokenizer), len(row["input_ids"])).tolist()
        return {**row, "input_ids": row["input_ids"][:1] + ids[1:]}

    def model() -> nn.Module:
        sizes = {"n_layer": 2, "n_head": 4, "n_embd": 128, "n_positions": 32}
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))

    rows = [dict(tokenizer(text)) for text in texts]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return SpikeTask(rows, spoil, model, collator, 1e-3)


def planted_run(
    task: SpikeTask, arguments: PlantedSpikesArguments, seed: int
) -> tuple[GradientRows, np.ndarray[Any, Any]]:
    """Train once in a known order.

    Returns:
        what was recorded, and whether each row of the order is bad, (steps, batch).
    """
    rng = np.random.default_rng(seed)
    count = arguments.steps * _BATCH
    passes = -(-count // len(task.rows))
    order = np.concatenate([rng.permutation(len(task.rows)) for _ in range(passes)])
    bad = np.zeros((arguments.steps, _BATCH), dtype=bool)
    late = np.arange(arguments.steps // 2, arguments.steps, _NEAREST)
    for step in rng.choice(late, min(arguments.bursts, len(late)), replace=False):
        bad[step, rng.choice(_BATCH, arguments.planted, replace=False)] = True
    rows = [task.rows[place] for place in order[:count]]
    rows = [
        task.spoil(row, rng) if wrong else row
        for row, wrong in zip(rows, bad.flat, strict=True)
    ]
    set_seed(seed)
    directory = Path(arguments.output_dir) / f"planted-{arguments.task}-{seed}"
    shutil.rmtree(directory, ignore_errors=True)
    trainer = Trainer(
        task.new_model(),
        silent_training(
            str(directory),
            seed,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=_BATCH,
            learning_rate=task.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=10,
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=task.collator,
        callbacks=[GradientSketchCallback(arguments.out_size)],
    )
    trainer.train()
    return load_sketches(directory), bad


def judged(
    store: GradientRows, bad: np.ndarray[Any, Any], threshold: float, seed: int
) -> dict[str, Any]:
    """Return how one run's spikes compare with the planted ones."""
    lines = store.find_spikes(threshold=threshold)
    planted = set((bad.any(1).nonzero()[0] + 1).tolist())
    ids, spiked = np.array(lines["example_id"][:], int), np.array(lines["step"][:], int)
    steps = set(spiked.tolist())
    false = steps - planted
    felt = {step + i for step in planted for i in range(1, _AFTER + 1)}
    named: dict[str, list[dict[str, float]]] = {}
    for step in sorted(steps & planted):
        own = ids[spiked == step]
        for name, found in _by_rule(store, step, own, seed).items():
            good = bad.flat[found]
            named.setdefault(name, []).append(
                {
                    "part_of_planted": float(good.sum() / bad[step - 1].sum()),
                    "part_of_named": float(good.mean()),
                }
            )
    return {
        "planted": len(planted),
        "found": len(steps & planted),
        "false": len(false),
        "false_soon_after": len(false & felt),
        "judged_steps": len(bad) - len(planted),
        "named": named,
    }


def _by_rule(
    store: GradientRows, step: int, shares: np.ndarray[Any, Any], seed: int
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the given number of a step's examples that each rule names."""
    rows, count = store.where(step=step).dataset, len(shares)
    ids = column(rows, "example_id")
    chance = np.random.default_rng([seed, step]).permutation(ids)
    by = {n: ids[(-column(rows, n)).argsort()] for n in ("loss", "gradient_norm")}
    return {
        "shares": shares,
        **{name: found[:count] for name, found in {**by, "chance": chance}.items()},
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the counts of all runs, and parts with Wilson's 95% intervals."""
    keys = ("planted", "found", "false", "false_soon_after", "judged_steps")
    total: dict[str, Any] = {key: sum(run[key] for run in runs) for key in keys}
    total["part_found"] = wilson(total["found"], total["planted"])
    for name in ("shares", "loss", "gradient_norm", "chance"):
        spikes = [spike for run in runs for spike in run["named"].get(name, [])]
        half = sum(spike["part_of_planted"] >= _HALF for spike in spikes)
        total[name] = {"names_half": wilson(half, len(spikes))}
        for key in ("part_of_planted", "part_of_named"):
            parts = [spike[key] for spike in spikes]
            total[name][key] = float(np.mean(parts)) if parts else None
    return total


def wilson(count: int, total: int) -> list[float] | None:
    """Return a part, and the ends of its 95% interval; None of nothing."""
    if not total:
        return None
    z, part = 1.96, count / total
    middle = (part + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z * (part * (1 - part) / total + z**2 / (4 * total**2)) ** 0.5
    half /= 1 + z**2 / total
    return [part, max(0.0, middle - half), min(1.0, middle + half)]


def run_planted_spikes(arguments: PlantedSpikesArguments) -> dict[str, Any]:
    """Plant, train, find, print and save."""
    if arguments.tiny:
        arguments = dataclasses.replace(
            arguments, seeds="0", steps=48, bursts=2, out_size=64
        )
    if arguments.task not in ("labels", "texts"):
        raise ValueError(f"task must be labels or texts, got {arguments.task!r}.")
    texts = arguments.task == "texts"
    task = texts_task() if texts else labels_task(480, arguments.train_file)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in map(int, arguments.seeds.split(",")):
        store, bad = planted_run(task, arguments, seed)
        for threshold in _THRESHOLDS:
            found.setdefault(f"{threshold:g}", []).append(
                judged(store, bad, threshold, seed)
            )
    results = {threshold: summary(runs) for threshold, runs in found.items()}
    for threshold, total in results.items():
        print(
            f"threshold {threshold:>3}: {total['found']} of {total['planted']} found, "
            f"{total['false']} others ({total['false_soon_after']} soon after) of "
            f"{total['judged_steps']} steps; half named: "
            f"{ {n: total[n]['names_half'] for n in ('shares', 'loss', 'chance')} }"
        )
    name = f"planted_spikes_{arguments.task}"
    print("saved", save_report(arguments.output_dir, name, arguments, results))
    return results


if __name__ == "__main__":
    run_planted_spikes(
        *HfArgumentParser(PlantedSpikesArguments).parse_args_into_dataclasses()
    )
