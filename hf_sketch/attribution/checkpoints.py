"""Rows of one dataset at several states of a model."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import concatenate_datasets
from torch import nn

from hf_sketch.attribution.collection import GradientRows
from hf_sketch.attribution.dataset import sketch_dataset
from hf_sketch.model.sketch import ModelSketch


def sketch_checkpoints(
    load: Callable[[Path], nn.Module],
    checkpoints: Iterable[str | Path],
    dataset: Any,
    model_sketch: ModelSketch,
    **options: Any,
) -> dict[int, GradientRows]:
    """Sketch a dataset at each of the Trainer's checkpoints.

    `GradientRows.attribute` takes the result as queries of a model that changed. For
    the training data, `concatenate_sketches` joins the rows that TracIn over
    checkpoints needs: `rows.attribute(queries, method="tracin", groups="example_id")`.

    Args:
        load: returns the model of a checkpoint's folder, as
            `AutoModelForSequenceClassification.from_pretrained`.
        checkpoints: folders `checkpoint-<step>` of a Trainer.
        dataset: tokenized examples, as for `sketch_dataset`.
        model_sketch: the map.
        options: for `sketch_dataset`.

    Returns:
        by optimizer step, rows with the columns `step` and `learning_rate`.

    Raises:
        FileNotFoundError: a folder is no checkpoint of a Trainer.
        ValueError: the Trainer logged no learning rate by then.
    """
    found: dict[int, GradientRows] = {}
    for folder in map(Path, checkpoints):
        step, rate = _moment(folder)
        rows = sketch_dataset(load(folder), dataset, model_sketch, **options)
        count = len(rows.dataset)
        columns = rows.dataset.add_column("step", np.full(count, step))
        columns = columns.add_column("learning_rate", np.full(count, rate))
        found[step] = replace(rows, dataset=columns)
    return found


def concatenate_sketches(parts: Sequence[GradientRows]) -> GradientRows:
    """Join rows that one map made.

    Raises:
        ValueError: there are none, or their maps differ.
    """
    maps = {part.model_sketch for part in parts}
    if len(maps) != 1:
        raise ValueError(
            f"The {len(parts)} sets of rows were made by {len(maps)} maps. Make all of "
            "them with the same model_sketch."
        )
    rows = concatenate_datasets([part.dataset for part in parts])
    return GradientRows(parts[0].model_sketch, rows)


def _moment(folder: Path) -> tuple[int, float]:
    """Return a checkpoint's step and the learning rate that was logged last."""
    path = folder / "trainer_state.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no checkpoint of a Trainer: it has no {path.name}. Pass "
            "folders such as <output_dir>/checkpoint-500."
        )
    state = json.loads(path.read_text())
    name = "learning_rate"
    rates = [line[name] for line in state["log_history"] if name in line]
    if not rates:
        raise ValueError(
            f"{path} has no learning rate in its log. Train with logging_steps of at "
            "most save_steps."
        )
    return state["global_step"], rates[-1]
