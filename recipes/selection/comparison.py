"""What training on a choice of rows is worth: the loss on held-out examples."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainingArguments, set_seed

from hf_sketch.model.state import evaluation_mode
from hf_sketch.recipes.texts.text_rows import TextModel

_RESAMPLES = 2000
_ENDS = (0.05, 0.95)


def compared_settings(
    training: TrainingArguments, name: str, epochs: float
) -> TrainingArguments:
    """The Trainer's options for a choice of this name."""
    return replace(
        training,
        output_dir=str(Path(str(training.output_dir)) / "compared" / name),
        num_train_epochs=epochs,
        save_strategy="no",
    )


def loss_after(
    text_model: TextModel,
    rows: Dataset,
    held_out: Dataset,
    settings: TrainingArguments,
) -> list[float]:
    """Train on rows; the mean loss on others, and the ends of its 90% interval.

    The interval is a bootstrap over the held-out examples: it does not hold what
    another seed of training would change.
    """
    set_seed(settings.seed)
    trainer = Trainer(
        text_model.model,
        settings,
        data_collator=text_model.collator,
        train_dataset=rows,
        processing_class=text_model.tokenizer,
    )
    trainer.train()
    losses = _losses(text_model, held_out)
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (_RESAMPLES, len(losses))
    means = losses[torch.randint(len(losses), shape, generator=generator)].mean(1)
    ends = torch.quantile(means, torch.tensor(_ENDS, dtype=means.dtype))
    return [float(losses.mean()), *ends.tolist()]


def print_comparison(
    choices: Mapping[str, Tensor], compared: Mapping[str, list[float]]
) -> None:
    """Print a line for each choice; the first is that by gradients."""
    mine = {*choices["gradients"].tolist()}
    print("Mean loss on held-out queries after training on each choice (90% interval):")
    for name, (loss, low, high) in compared.items():
        shared = len(mine & {*choices[name].tolist()}) / len(mine)
        print(
            f"  {name:10s} {loss:.4f} ({low:.4f} to {high:.4f}), has {shared:.0%} of "
            "the rows chosen by gradients"
        )


def _losses(text_model: TextModel, rows: Dataset) -> Tensor:
    """Each row's own loss, (rows,), float64."""
    found: list[float] = []
    device = text_model.model.device
    with torch.no_grad(), evaluation_mode(text_model.model):
        for row in rows.to_list():
            inputs: dict[str, Any] = dict(text_model.collator([row]))
            moved = {name: value.to(device) for name, value in inputs.items()}
            found.append(float(text_model.model(**moved).loss))
    return torch.tensor(found, dtype=torch.float64)
