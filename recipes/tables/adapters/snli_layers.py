"""The last layers of MiniLM on SNLI, as a task of the table of methods."""

import copy
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, DataCollatorWithPadding, set_seed

from hf_sketch.recipes.tables.adapters.task import PeersTask, Rows
from hf_sketch.recipes.texts.entailment import load_pairs, tokenize
from hf_sketch.recipes.texts.minilm import embedded_model_path, new_model

_MAX_LENGTH: Final = 48
_BATCH: Final = 100


class _Computed(nn.Module):
    """Stands for embeddings and first layers whose outputs are given."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds


def snli_task(
    trained_layers: int,
    rows: tuple[int, int, int],
    train_file: str | None = None,
    validation_file: str | None = None,
) -> PeersTask:
    """Read the rows and compute what comes before the last layers.

    The model has the last layers, the pooler and a new classifier.

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
    parts = evaluation.part(slice(tuning)), evaluation.part(slice(tuning, None))
    return PeersTask(top, train, *parts)


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
        for start in range(0, len(labels), _BATCH):
            own = slice(start, start + _BATCH)
            part = {name: value[own] for name, value in inputs.items()}
            states = model(**part, output_hidden_states=True).hidden_states
            hidden.append(states[first])
    states = torch.cat(hidden)
    mask = inputs["attention_mask"]
    return Rows({"inputs_embeds": states, "attention_mask": mask, "labels": labels})
