"""Wrong labels found by gradients, beside finding them by the loss."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_sketch import ModelSketch, load_sketches, sketch_dataset
from hf_sketch.attribution.columns import column
from hf_sketch.attribution.evaluation import mislabel_auc
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.texts.minilm import embedded_model_path, new_model
from hf_sketch.recipes.texts.snli_sample import flip_labels, load_snli_sample, tokenize
from hf_sketch.store.blocks import sketch_matrix

DAMPINGS = (1.0, 10.0, 100.0)


@dataclass
class MislabelledArguments(ReportArguments):
    """How well scores find wrong labels among SNLI's, of a fine-tuned MiniLM.

    All scores are larger for rows that are likelier to be wrong; told is the AUC.
    """

    fraction: float = field(default=0.1, metadata={"help": "Of labels made wrong."})
    out_size: int = field(default=4096, metadata={"help": "Numbers in a sketch."})
    num_train_epochs: int = field(
        default=3, metadata={"help": "Passes over the data; a checkpoint after each."}
    )
    seed: int = field(default=0, metadata={"help": "Of labels, order and model."})
    tiny: bool = field(default=False, metadata={"help": "A few rows, as a check."})


@dataclass(frozen=True)
class State:
    """All rows at one state of the model, in evaluation mode.

    Shapes:
        rows (n, out_size), losses (n,), validation (m, out_size)
    """

    rows: Tensor
    losses: Tensor
    validation: Tensor


def disagreement(rows: Tensor, damping: float) -> Tensor:
    """How far a row points from the others: -sum_j u_i @ inverse(C) @ u_j / n.

    u are rows of unit length, C is the mean of u u^T plus `damping` times its mean
    eigenvalue; the sum is over all j but i.

    Shapes:
        rows (n, out_size) -> (n,), float64
    """
    unit = torch.nn.functional.normalize(rows, dim=1).double()
    values, vectors = torch.linalg.eigh(unit @ unit.T)
    values = values.clamp(min=0)
    kept = values / (values + damping * values.sum() / rows.shape[1])
    kernel = (vectors * kept) @ vectors.T
    return kernel.diagonal() - kernel.sum(1)


def scores_of(states: Sequence[State]) -> dict[str, list[Tensor]]:
    """Scores by name, for each state."""
    scores: dict[str, list[Tensor]] = {
        "loss": [state.losses for state in states],
        "self-influence": [state.rows.square().sum(1) for state in states],
        "opponents of validation, cosine": [
            -_unit(state.rows) @ _unit(state.validation).mean(0) for state in states
        ],
    }
    for damping in DAMPINGS:
        scores[f"disagreement with the others, damping {damping:g}"] = [
            disagreement(state.rows, damping) for state in states
        ]
    return scores


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def auc_of(states: Sequence[State], wrong: Tensor) -> dict[str, list[float]]:
    """The AUC of each score at each state, and of its sum over them all.

    What is summed has unit variance at each state.
    """
    found: dict[str, list[float]] = {}
    for name, by_state in scores_of(states).items():
        whole = torch.stack([part / part.std() for part in by_state]).sum(0)
        found[name] = [mislabel_auc(part, wrong) for part in [*by_state, whole]]
    return found


def run_mislabelled(arguments: MislabelledArguments) -> dict[str, Any]:
    """Train, score, print and save."""
    if arguments.tiny:
        arguments = dataclasses.replace(arguments, out_size=64, num_train_epochs=2)
    set_seed(arguments.seed)
    directory = Path(arguments.output_dir) / "mislabelled"
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    train, validation = load_snli_sample("train"), load_snli_sample("validation")
    if arguments.tiny:
        train, validation = train.select(range(48)), validation.select(range(12))
    flipped = flip_labels(train, arguments.fraction, arguments.seed)
    inputs = tokenize(flipped.dataset, tokenizer)
    _train(arguments, directory, inputs, tokenizer)
    store = load_sketches(directory)
    last = store.where(epoch=max(column(store.dataset, "epoch"))).dataset
    wrong = flipped.flipped[torch.from_numpy(column(last, "example_id"))]
    recorded = mislabel_auc(torch.from_numpy(column(last, "loss")), wrong)
    states = [
        _state(path, store.model_sketch, inputs, tokenize(validation, tokenizer))
        for path in _checkpoints(directory)
    ]
    results = {
        "loss, as recorded in the last epoch": recorded,
        **auc_of(states, flipped.flipped),
    }
    _print(results)
    path = save_report(arguments.output_dir, "mislabelled", arguments, results)
    print("saved", path)
    return results


def _train(
    arguments: MislabelledArguments, directory: Path, inputs: Dataset, tokenizer: Any
) -> None:
    """Fine-tune, with a checkpoint after each epoch."""
    settings = TrainingArguments(
        str(directory),
        num_train_epochs=arguments.num_train_epochs,
        per_device_train_batch_size=16,
        learning_rate=1e-4,
        warmup_steps=20,
        logging_steps=25,
        save_strategy="epoch",
        report_to=[],
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=arguments.seed,
    )
    trainer = Trainer(
        new_model(),
        settings,
        train_dataset=inputs,
        processing_class=tokenizer,
        callbacks=[GradientSketchCallback(out_size=arguments.out_size)],
    )
    trainer.train()


def _checkpoints(directory: Path) -> list[Path]:
    """Of a run, in order."""
    return sorted(
        directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])
    )


def _state(
    path: Path, model_sketch: ModelSketch, train: Dataset, validation: Dataset
) -> State:
    """All rows at a checkpoint."""
    model = AutoModelForSequenceClassification.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows, held_out = (
        sketch_dataset(model, data, model_sketch, processing_class=tokenizer).dataset
        for data in (train, validation)
    )
    losses = torch.from_numpy(column(rows, "loss"))
    return State(sketch_matrix(rows), losses, sketch_matrix(held_out))


def _print(results: dict[str, Any]) -> None:
    print("AUC of finding wrong labels: after each epoch, and summed over them")
    for name, found in results.items():
        numbers = [found] if isinstance(found, float) else found
        print(f"  {name:48s} {'  '.join(f'{number:.3f}' for number in numbers)}")


if __name__ == "__main__":
    run_mislabelled(
        *HfArgumentParser(MislabelledArguments).parse_args_into_dataclasses()
    )
