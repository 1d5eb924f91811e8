"""Sketches of one dataset at several states of a model."""

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

    Of queries, this is what `GradientRows.attribute` takes for a model that changed. Of
    the training data, `concatenate_sketches` makes the rows that TracIn over
    checkpoints needs: `rows.attribute(queries, method="tracin", groups="example_id")`.

    Args:
        load: gives the model of a checkpoint's folder, as
            `AutoModelForSequenceClassification.from_pretrained`.
        checkpoints: folders `checkpoint-<step>` of a Trainer.
        dataset: tokenised examples, as for `sketch_dataset`.
        model_sketch: the map.
        options: for `sketch_dataset`.

    Returns:
        by optimizer step, sketches with the columns `step` and `learning_rate`.

    Raises:
        FileNotFoundError: a folder is no checkpoint of a Trainer.
        ValueError: the Trainer logged no learning rate by then.
    """
    found: dict[int, GradientRows] = {}
    for folder in map(Path, checkpoints):
        step, rate = _moment(folder)
        sketches = sketch_dataset(load(folder), dataset, model_sketch, **options)
        count = len(sketches.dataset)
        rows = sketches.dataset.add_column("step", np.full(count, step))
        rows = rows.add_column("learning_rate", np.full(count, rate))
        found[step] = replace(sketches, dataset=rows)
    return found


def concatenate_sketches(parts: Sequence[GradientRows]) -> GradientRows:
    """The rows of several sketches of one map, as one.

    Raises:
        ValueError: there are none, or their maps differ.
    """
    maps = {part.model_sketch for part in parts}
    if len(maps) != 1:
        raise ValueError(
            f"sketches of one map are needed, got {len(maps)} maps in {len(parts)} "
            "sketches: make all of them with the same model_sketch."
        )
    rows = concatenate_datasets([part.dataset for part in parts])
    return GradientRows(parts[0].model_sketch, rows)


def _moment(folder: Path) -> tuple[int, float]:
    """The step of a checkpoint and the learning rate that was logged last."""
    path = folder / "trainer_state.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} must be a checkpoint of a Trainer, got no {path.name} there: "
            "pass folders such as <output_dir>/checkpoint-500."
        )
    state = json.loads(path.read_text())
    name = "learning_rate"
    rates = [line[name] for line in state["log_history"] if name in line]
    if not rates:
        raise ValueError(
            f"{path} must tell a learning rate, got a log without: train with "
            "logging_steps of at most save_steps."
        )
    return state["global_step"], rates[-1]
