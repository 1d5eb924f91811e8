"""Tiny models, examples and Trainers of a text classifier."""

import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

CLASSES = 3
VOCABULARY = 97


def tiny_bert(num_labels=CLASSES, seed=0, **config):
    """A BERT classifier of some 20,000 parameters, with dropout."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 20,
        "num_labels": num_labels,
    }
    return BertForSequenceClassification(BertConfig(**{**settings, **config}))


def undropped_bert():
    return tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def tiny_batch(size=5, length=11, seed=1):
    """Token ids with padding of different lengths, and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (size, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (size, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    labels = torch.randint(0, CLASSES, (size,), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def tiny_dataset(rows=22):
    """Examples whose first token is their row number, and a column no model takes."""
    batch = tiny_batch(rows)
    batch["input_ids"][:, 0] = torch.arange(rows) + 1
    columns = {name: column.tolist() for name, column in batch.items()}
    columns["label"] = columns.pop("labels")
    return Dataset.from_dict({**columns, "text": ["some text"] * rows})


TINY_TRAINING = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 7,
}


def tiny_trainer(
    output_dir, *callbacks, model=None, dataset=None, eval_dataset=None, **arguments
):
    """A Trainer with dropout, accumulation, clipping and a last partial batch."""
    return Trainer(
        tiny_bert() if model is None else model,
        TrainingArguments(str(output_dir), **{**TINY_TRAINING, **arguments}),
        train_dataset=tiny_dataset() if dataset is None else dataset,
        eval_dataset=eval_dataset,
        callbacks=list(callbacks),
    )


class RowNotes(TrainerCallback):
    """Notes the row number of each training example, by its first token."""

    def __init__(self):
        self.rows = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        def note(module, args, kwargs):
            if module.training:
                self.rows += (kwargs["input_ids"][:, 0] - 1).tolist()

        model.register_forward_pre_hook(note, with_kwargs=True)


class GradientNotes(TrainerCallback):
    """Keeps the gradients that the optimizer gets."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters()}
        )


class Interrupt(TrainerCallback):
    """Stops training with an exception after a step, as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt
