"""A resumable run with LoRA that records its pool in Adam's geometry."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from peft.utils import CONFIG_NAME as ADAPTERS_CONFIG
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME

from hf_sketch import GradientRows, load_sketches, sketch_dataset
from hf_sketch.attribution.columns import column
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.recipes.texts.text_rows import TextModel, load_text_model
from hf_sketch.store.blocks import sketch_matrix

_SAVED_MODEL = (CONFIG_NAME, ADAPTERS_CONFIG)
_TASKS = {
    "causal": TaskType.CAUSAL_LM,
    "seq2seq": TaskType.SEQ_2_SEQ_LM,
    "classification": TaskType.SEQ_CLS,
}


class _PauseAt(TrainerCallback):
    """Saves a checkpoint after a step, and ends the call of `train` there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True


def with_adapters(text_model: TextModel, rank: int) -> TextModel:
    """The model with new LoRA adapters on all linear layers, the rest frozen."""
    config = LoraConfig(
        task_type=_TASKS[text_model.kind],
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(x, Conv1D) for x in text_model.model.modules()),
    )
    model: Any = get_peft_model(text_model.model, config)
    return replace(text_model, model=model)


def recorded_pool(
    text_model: TextModel,
    pool: Dataset,
    training: TrainingArguments,
    *,
    warmup_share: float,
    out_size: int,
) -> GradientRows:
    """Train on the pool and return the rows that were recorded.

    The first steps only train. From their checkpoint, whose second moments divide all
    gradients, training continues and records. An interrupted run resumes from its last
    checkpoint.

    Args:
        text_model: model with adapters, which are trained, and its tokenizer.
        pool: its tokenized rows.
        training: arguments of the Trainer, which saves at the end of the epoch.
        warmup_share: fraction of the steps that warm up the learning rate.
        out_size: numbers per row.
    """
    trainer = Trainer(
        text_model.model,
        training,
        data_collator=text_model.collator,
        train_dataset=pool,
        processing_class=text_model.tokenizer,
    )
    steps = len(trainer.get_train_dataloader()) // training.gradient_accumulation_steps
    warmup = max(1, round(warmup_share * steps * training.num_train_epochs))
    last = _last_checkpoint(training)
    if last is None or _step_of(last) < warmup:
        pause = _PauseAt(warmup)
        trainer.add_callback(pause)
        trainer.train(resume_from_checkpoint=last)
        trainer.remove_callback(pause)
        last = _last_checkpoint(training)
    trainer.add_callback(GradientSketchCallback(out_size, normalize="adam"))
    trainer.train(resume_from_checkpoint=last)
    return load_sketches(str(training.output_dir))


def trained_model(directory: str) -> TextModel:
    """Load the model of a run as training left it.

    Args:
        directory: the run's output_dir. Its last checkpoint is used, or what
            `Trainer.save_model` saved there if it has none.

    Raises:
        FileNotFoundError: it has neither.
    """
    last = get_last_checkpoint(directory) if Path(directory).is_dir() else None
    saved = [Path(directory) / name for name in _SAVED_MODEL]
    if last is None and not any(path.is_file() for path in saved):
        raise FileNotFoundError(
            f"{directory} must have a checkpoint, got none: pass the output_dir of a "
            "run that saved one."
        )
    return load_text_model(last or directory)


@dataclass(frozen=True)
class PoolRows:
    """A row or more of each example of a pool.

    Args:
        recorded: while training ran.
        rest: rows of examples that training did not record, as in the warm-up, at
            the model's present weights; None if there are none.
        missing: the numbers of these examples in the pool.
    """

    recorded: GradientRows
    rest: GradientRows | None
    missing: list[int]

    @classmethod
    def of(
        cls, text_model: TextModel, recorded: GradientRows, pool: Dataset
    ) -> "PoolRows":
        """Sketch what is missing of the tokenized pool."""
        met = np.unique(column(recorded.dataset, "example_id")).tolist()
        missing = sorted({*range(len(pool))} - {*met})
        if not missing:
            return cls(recorded, None, [])
        rest = sketched(text_model, recorded, pool.select(missing))
        return cls(recorded, rest, missing)

    def scores(self, queries: GradientRows) -> Tensor:
        """The cosine of each query with each example's gradient, (queries, examples).

        With several records of an example, their mean.
        """
        ids = np.unique(column(self.recorded.dataset, "example_id"))
        shape = len(queries), len(ids) + len(self.missing)
        scores = torch.empty(shape, dtype=torch.float64)
        scores[:, ids] = self.recorded.scores(queries, "cosine", "example_id")
        if self.rest is not None:
            scores[:, self.missing] = self.rest.scores(queries, "cosine").double()
        return scores

    def directions(self, examples: list[int]) -> Tensor:
        """The sum of some examples' rows at unit length, (examples, out_size)."""
        found = torch.zeros(len(examples), self.recorded.model_sketch.row_size)
        places = {example: place for place, example in enumerate(examples)}
        parts: list[tuple[Dataset, list[int] | None]] = [(self.recorded.dataset, None)]
        if self.rest is not None:
            parts.append((self.rest.dataset, self.missing))
        for rows, names in parts:
            ids = column(rows, "example_id").tolist()
            ids = ids if names is None else [names[i] for i in ids]
            mine = [place for place, example in enumerate(ids) if example in places]
            if mine:
                unit = normalize(sketch_matrix(rows.select(mine)), dim=1)
                into = torch.tensor([places[ids[place]] for place in mine])
                found.index_add_(0, into, unit)
        return normalize(found, dim=1)


def sketched(text_model: TextModel, like: GradientRows, rows: Dataset) -> GradientRows:
    """Rows by the same map as others, at the model's present weights."""
    return sketch_dataset(
        text_model.model,
        rows,
        like.model_sketch,
        processing_class=text_model.tokenizer,
        data_collator=text_model.collator,
    )


def _last_checkpoint(training: TrainingArguments) -> str | None:
    directory = str(training.output_dir)
    return get_last_checkpoint(directory) if Path(directory).is_dir() else None


def _step_of(checkpoint: str) -> int:
    return int(Path(checkpoint).name.rpartition("-")[2])
