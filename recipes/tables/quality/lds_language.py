"""A language model that is fine-tuned on subsets of some texts."""

from copy import deepcopy

import torch
from torch import nn
from transformers import set_seed

from hf_sketch.recipes.tables.quality.lds_training import Task
from hf_sketch.recipes.texts.data_files import read_data_file
from hf_sketch.recipes.texts.text_rows import load_text_model, text_columns, tokenized

_TOKENS = 64


class LanguageModel(Task):
    """The first tokens of texts and a causal language model, by AdamW.

    Args:
        rows: how many to train on.
        queries: how many other texts to ask of.
        epochs: passes over the rows.
        model: folder of a pretrained model.
        train_file: texts.
        validation_file: texts to ask of.

    Raises:
        ValueError: a file has fewer texts.
    """

    def __init__(
        self,
        rows: int,
        queries: int,
        epochs: int,
        model: str,
        train_file: str,
        validation_file: str,
    ) -> None:
        set_seed(0)
        text_model = load_text_model(model)
        self._model = text_model.model
        sets = []
        for path, count in ((train_file, rows), (validation_file, queries)):
            texts = read_data_file(path)
            if len(texts) < count:
                raise ValueError(
                    f"{path} must have {count} texts, got {len(texts)}: pass fewer."
                )
            some = texts.shuffle(seed=0).select(range(count))
            columns = text_columns(some, text_model.kind)
            sets.append(tokenized(some, text_model, columns, _TOKENS, path).to_list())
        self.rows, self.queries = sets
        self.collate = text_model.collator
        self.epochs, self.batch_size, self.batch_at_once = epochs, 16, 32
        self.smooth = self.decays = True

    def new_model(self) -> nn.Module:
        return deepcopy(self._model)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-3)
