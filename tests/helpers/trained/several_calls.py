"""Losses that are made of several calls of a model, and a Trainer of them."""

import torch
from datasets import Dataset
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.trained.text_training import undropped

SIZE = 128
ROWS = 10
COLUMNS = ("first", "second", "third")


def texts():
    """Three texts per example, of different lengths."""
    generator = torch.Generator().manual_seed(1)

    def text():
        length = int(torch.randint(3, 9, (1,), generator=generator))
        return torch.randint(3, 64, (length,), generator=generator).tolist()

    return Dataset.from_list([{name: text() for name in COLUMNS} for _ in range(ROWS)])


def padded(items):
    """A batch of tokens for each column, as `first_input_ids`."""
    batch = {}
    for name in COLUMNS:
        rows = [torch.tensor(item[name]) for item in items]
        pad = torch.nn.utils.rnn.pad_sequence
        batch[f"{name}_input_ids"] = pad(rows, batch_first=True)
        masks = [torch.ones_like(row) for row in rows]
        batch[f"{name}_attention_mask"] = pad(masks, batch_first=True)
    return batch


def column(batch, name):
    own = {key: value for key, value in batch.items() if key.startswith(f"{name}_")}
    return {key.removeprefix(f"{name}_"): value for key, value in own.items()}


def score(model, inputs):
    """The log-probability of each text: (b,)."""
    logits = model(**inputs).logits[:, :-1].log_softmax(-1)
    ids, mask = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:]
    return (logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) * mask).sum(1)


def preference(model, batch):
    """Prefers the first text to the second, as DPO with the model as its reference."""
    chosen = score(model, column(batch, "first"))
    with torch.no_grad():
        reference = score(model, column(batch, "third"))
    rejected = score(model, column(batch, "second"))
    return -functional.logsigmoid(0.1 * (chosen - rejected - reference)).mean()


def merged(model, batch):
    """A triplet loss whose positive and negative go through the model as one batch."""
    anchor = score(model, column(batch, "first"))
    length = max(batch[f"{name}_input_ids"].shape[1] for name in COLUMNS[1:])
    others = {
        key: torch.cat(
            [
                functional.pad(x := column(batch, name)[key], (0, length - x.shape[1]))
                for name in COLUMNS[1:]
            ]
        )
        for key in ("input_ids", "attention_mask")
    }
    positive, negative = score(model, others).chunk(2)
    return ((anchor - positive).square() - 0.5 * (anchor - negative).square()).mean()


def twice(model, batch):
    """The batch twice, in two views that are to agree: R-Drop without chance."""
    inputs = column(batch, "first")
    labels = inputs["input_ids"][:, 0] % 3
    whole = model(**inputs, labels=labels)
    view = inputs["attention_mask"].clone()
    view[:, 1] = 0
    cut = model(inputs["input_ids"], attention_mask=view, labels=labels)
    agreement = (whole.logits - cut.logits).square().sum(1).mean()
    return whole.loss + 0.5 * cut.loss + agreement


def in_parts(model, batch):
    """The batch in parts of three examples."""
    inputs = column(batch, "first")
    parts = zip(*(value.split(3) for value in inputs.values()), strict=True)
    scores = [score(model, dict(zip(inputs, part, strict=True))) for part in parts]
    return torch.cat(scores).square().mean()


def product(model, batch, calls):
    """A loss of one, two or three calls."""
    scores = [score(model, column(batch, name)) for name in COLUMNS[:calls]]
    return torch.stack(scores).div(10).prod(0).mean()


def over_pairs(model, batch):
    """Each first text against the second texts of all."""
    first, second = (score(model, column(batch, name)) for name in COLUMNS[:2])
    places = torch.arange(len(first))
    return functional.cross_entropy(torch.outer(first, second) / 100, places)


class SeveralCalls(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss = self.make_loss(model, inputs)
        return (loss, {}) if return_outputs else loss


def trainer_of(directory, loss, model=None, callback=None, data=None, **arguments):
    settings = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    trainer = SeveralCalls(
        undropped("llama") if model is None else model,
        TrainingArguments(str(directory), **{**settings, **arguments}),
        train_dataset=texts() if data is None else data,
        data_collator=padded,
        callbacks=[callback or GradientSketchCallback(SIZE)],
    )
    trainer.make_loss = loss
    return trainer
