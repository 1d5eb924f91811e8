"""The last layers of MiniLM on SNLI: what methods of fine-tuning are compared on."""

import copy
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
    set_seed,
)

from hf_sketch.recipes.texts.entailment import load_pairs, tokenize
from hf_sketch.recipes.texts.minilm import embedded_model_path, new_model

_WARM_UP: Final = 0.1  # of the steps
_MAX_LENGTH: Final = 48
_EVALUATION_BATCH: Final = 100
_WINDOW: Final = 16  # batches whose rows are sorted by length together


class _Computed(nn.Module):
    """Stands for embeddings and first layers whose outputs are given."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows as the last layers see them.

    Shapes:
        hidden (rows, length, width), mask (rows, length), labels (rows,)
    """

    hidden: Tensor
    mask: Tensor
    labels: Tensor

    def batch(self, own: Tensor) -> dict[str, Tensor]:
        """Return the model's inputs for some rows, without padding common to all."""
        mask = self.mask[own]
        length = int(mask.sum(1).max())
        return {
            "inputs_embeds": self.hidden[own, :length],
            "attention_mask": mask[:, :length],
            "labels": self.labels[own],
        }

    def batches(self, steps: int, size: int) -> list[Tensor]:
        """Return the rows of random batches, each of rows of similar lengths."""
        lengths, batches = self.mask.sum(1), []
        while len(batches) < steps:
            for window in torch.randperm(len(lengths)).split(_WINDOW * size):
                inside = window[lengths[window].argsort()].split(size)
                batches += [inside[i] for i in torch.randperm(len(inside))]
        return batches[:steps]


@dataclass(frozen=True, eq=False)
class PeersTask:
    """What all methods learn.

    Args:
        model: the last layers, the pooler and a new classifier.
        train: rows of training.
        tuning: rows that choose the learning rate.
        test: rows of the reported accuracy.
    """

    model: nn.Module
    train: Rows
    tuning: Rows
    test: Rows

    @classmethod
    def load(
        cls,
        trained_layers: int,
        rows: tuple[int, int, int],
        train_file: str | None = None,
        validation_file: str | None = None,
    ) -> "PeersTask":
        """Read the rows and compute what comes before the last layers.

        Args:
            trained_layers: number of last layers.
            rows: rows of training, at most, of tuning and of the test.
            train_file: SNLI's rows; None for our own pairs.
            validation_file: the same, for tuning and the test.
        """
        set_seed(0)
        whole: Any = new_model().eval()
        first = whole.config.num_hidden_layers - trained_layers
        top = copy.deepcopy(whole)
        top.bert.embeddings = _Computed()
        top.bert.encoder.layer = top.bert.encoder.layer[first:]
        count, tuning, test = rows
        pairs = load_pairs("train", train_file)
        train = _rows(whole, first, pairs.select(range(min(count, len(pairs)))))
        other = load_pairs("validation", validation_file)
        held = range(min(tuning + test, len(other)))
        evaluation = _rows(whole, first, other.select(held))
        parts = [
            Rows(evaluation.hidden[own], evaluation.mask[own], evaluation.labels[own])
            for own in (slice(tuning), slice(tuning, None))
        ]
        return cls(top, train, *parts)

    def fit(
        self, model: nn.Module, rate: float, seed: int, steps: int, batch: int
    ) -> None:
        """Train with AdamW, a linear schedule and no weight decay."""
        set_seed(seed)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0)
        schedule = get_linear_schedule_with_warmup(
            optimizer, int(_WARM_UP * steps), steps
        )
        model.train()
        for own in self.train.batches(steps, batch):
            model(**self.train.batch(own)).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def _rows(model: Any, first: int, pairs: Any) -> Rows:
    """Pairs up to a layer's input."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    columns = ("input_ids", "attention_mask", "token_type_ids", "label")
    encoded = tokenize(pairs, tokenizer, _MAX_LENGTH).select_columns(list(columns))
    collator = DataCollatorWithPadding(
        tokenizer, padding="max_length", max_length=_MAX_LENGTH
    )
    inputs = dict(collator([encoded[i] for i in range(len(encoded))]))
    labels = inputs.pop("labels")
    hidden = []
    with torch.no_grad():
        for start in range(0, len(labels), _EVALUATION_BATCH):
            own = slice(start, start + _EVALUATION_BATCH)
            part = {name: value[own] for name, value in inputs.items()}
            states = model(**part, output_hidden_states=True).hidden_states
            hidden.append(states[first])
    return Rows(torch.cat(hidden), inputs["attention_mask"], labels)


@torch.no_grad()
def measured(model: nn.Module, rows: Rows) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    model.eval()
    loss, right = 0.0, 0
    for own in rows.mask.sum(1).argsort().split(_EVALUATION_BATCH):
        batch = rows.batch(own)
        output = model(**batch)
        loss += float(output.loss) * len(own)
        right += int((output.logits.argmax(1) == batch["labels"]).sum())
    return loss / len(rows.labels), right / len(rows.labels)
