"""Language models trained on ten documents, without dropout."""

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.trained.tiny_models import VOCABULARY, tiny_model

SIZE = 256
LENGTHS = (9, 5, 7, 4, 9, 6, 8, 3, 9, 5)


def documents():
    """Token ids of ten documents of different lengths."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        for length in LENGTHS
    ]


def text_dataset(ids=None):
    ids = documents() if ids is None else ids
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


class Pad:
    """Pads token ids on one side; padding and first tokens have no label."""

    def __init__(self, side="right"):
        self.side = side

    def __call__(self, examples):
        longest = max(len(example["input_ids"]) for example in examples)
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for example in examples:
            missing = longest - len(example["input_ids"])
            ones = [1] * len(example["input_ids"])
            for name, values, padding in (
                ("input_ids", example["input_ids"], 0),
                ("attention_mask", ones, 0),
                ("labels", [-100, *example["labels"][1:]], -100),
            ):
                fill = [padding] * missing
                row = fill + values if self.side == "left" else values + fill
                batch[name].append(row)
        return {name: torch.tensor(rows) for name, rows in batch.items()}


def undropped(name, **config):
    """A float32 model without dropout, so that training mode changes nothing."""
    names = ("dropout", "attention_dropout", "dropout_rate", "resid_pdrop")
    names += ("embd_pdrop", "attn_pdrop", "hidden_dropout_prob")
    names += ("attention_probs_dropout_prob",)
    return tiny_model(name, torch.float32, **dict.fromkeys(names, 0.0), **config)


def train(tmp_path, model, dataset, collator=None, callbacks=(), **arguments):
    settings = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "remove_unused_columns": False,
    }
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), **{**settings, **arguments}),
        train_dataset=dataset,
        data_collator=collator,
        callbacks=list(callbacks) or [GradientSketchCallback(SIZE)],
    )
    trainer.train()
    return load_sketches(tmp_path)
