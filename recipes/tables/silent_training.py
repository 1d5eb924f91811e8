"""Trainings of tables' scripts, which log, save and show nothing."""

from typing import Any

import torch
from transformers import TrainingArguments


def silent_training(directory: str, seed: int, **settings: Any) -> TrainingArguments:
    """Return a Trainer's arguments for a training of which only rows are kept.

    Args:
        directory: where callbacks leave their rows.
        seed: seed of the training.
        settings: further arguments of the Trainer.
    """
    return TrainingArguments(
        directory,
        seed=seed,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        **settings,
    )
