"""Scores of training rows without gradients, to compare with."""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, Final

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from hf_sketch import CounterRandom
from hf_sketch.model.state import evaluation_mode
from hf_sketch.recipes.texts.text_rows import TextModel

BASELINES: Final = ("random", "bm25", "rds")


def check_baselines(names: Sequence[str]) -> None:
    """Raise unless all are known, and the packages that they need are installed.

    Raises:
        ValueError: a name is unknown.
        ModuleNotFoundError: bm25s is not installed.
    """
    if unknown := [name for name in names if name not in BASELINES]:
        raise ValueError(
            f"baselines must be among {', '.join(BASELINES)}, got {unknown}: pass e.g. "
            "--baseline random,rds."
        )
    if "bm25" in names and importlib.util.find_spec("bm25s") is None:
        raise ModuleNotFoundError(
            'bm25 needs the package bm25s, got none installed: call pip install "'
            'hf-sketch[select]".'
        )


def random_scores(rows: int, seed: int) -> Tensor:
    """A random order, (rows,)."""
    return CounterRandom(seed, "select").permutation(rows).float()


def bm25_scores(texts: Sequence[str], queries: Sequence[str]) -> Tensor:
    """The relevance of each text to each query by shared words, (queries, rows)."""
    bm25s: Any = importlib.import_module("bm25s")
    index = bm25s.BM25()
    index.index(bm25s.tokenize([*texts], show_progress=False), show_progress=False)
    words = bm25s.tokenize([*queries], return_ids=False, show_progress=False)
    return torch.stack([torch.as_tensor(index.get_scores(one)) for one in words])


def rds_scores(text_model: TextModel, rows: Dataset, queries: Dataset) -> Tensor:
    """The cosine of mean last hidden states, (queries, rows).

    Args:
        text_model: before training.
        rows: the tokenized pool.
        queries: the tokenized examples of the target.

    Reference:
        Zhang et al. 2018, arXiv:1801.03924, named RDS by Xia et al. 2024 (LESS),
        arXiv:2402.04333.
    """
    pool, asked = (_representations(text_model, some) for some in (rows, queries))
    return asked @ pool.T


def _representations(text_model: TextModel, rows: Dataset) -> Tensor:
    """Mean last hidden states at unit length, (rows, width)."""
    model, found = text_model.model, list[Tensor]()
    with torch.no_grad(), evaluation_mode(model):
        for start in tqdm(range(0, len(rows), 8), desc="Reading texts", unit="batch"):
            some = rows.select(range(start, min(start + 8, len(rows)))).to_list()
            inputs = dict(text_model.collator(some))
            inputs = {name: x.to(model.device) for name, x in inputs.items()}
            output = model(**inputs, output_hidden_states=True)
            states = getattr(output, "encoder_hidden_states", None)
            states = (states or output.hidden_states)[-1].float()
            mask = inputs["attention_mask"].unsqueeze(-1)
            found.append(((states * mask).sum(1) / mask.sum(1)).cpu())
    return torch.nn.functional.normalize(torch.cat(found), dim=1)
