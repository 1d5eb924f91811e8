import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_sketch import (
    ModelSketch,
    concatenate_sketches,
    sketch_checkpoints,
    sketch_dataset,
)
from tests.helpers.trained.training import tiny_dataset, tiny_trainer

load = AutoModelForSequenceClassification.from_pretrained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a training run with a checkpoint after each of three epochs."""
    directory = tmp_path_factory.mktemp("run")
    tiny_trainer(
        directory, num_train_epochs=3, save_strategy="epoch", logging_steps=1
    ).train()
    return directory


def checkpoints_in(directory):
    folders = directory.glob("checkpoint-*")
    return sorted(folders, key=lambda folder: int(folder.name.rpartition("-")[2]))


def test_tracin_over_checkpoints_sums_over_them(run):
    folders = checkpoints_in(run)
    assert len(folders) == 3
    data = tiny_dataset()
    queries = data.select(range(3))
    sketch = ModelSketch.from_model(load(folders[0]), 512)
    rows = concatenate_sketches(
        [*sketch_checkpoints(load, folders, data, sketch).values()]
    )
    asked = sketch_checkpoints(load, folders, queries, sketch)
    got = rows.scores(asked, "tracin", groups="example_id")
    expected = torch.zeros(3, len(data), dtype=torch.float64)
    for folder in folders:
        model = load(folder)
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        rate = [line["learning_rate"] for line in log if "learning_rate" in line][-1]
        there = sketch_dataset(model, data, sketch)
        asked_there = sketch_dataset(model, queries, sketch)
        expected += rate * there.scores(asked_there, "dot").double()
    assert rows.dataset.unique("step") == [*asked]
    scale = float(expected.abs().max())
    assert got.numpy() == pytest.approx(expected.numpy(), rel=1e-5, abs=1e-6 * scale)


def test_folders_that_are_no_checkpoints_are_named(tmp_path):
    sketch = ModelSketch((("w", (4, 4)),), 4)
    with pytest.raises(FileNotFoundError, match=r"has no trainer_state\.json\. Pass"):
        sketch_checkpoints(load, [tmp_path], tiny_dataset(), sketch)
    state = {"global_step": 3, "log_history": [{"loss": 1.0}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="has no learning rate in its log"):
        sketch_checkpoints(load, [tmp_path], tiny_dataset(), sketch)


def test_sketches_of_different_maps_are_not_joined(run):
    model = load(checkpoints_in(run)[0])
    data = tiny_dataset().select(range(2))
    parts = [
        sketch_dataset(model, data, ModelSketch.from_model(model, 64, seed=seed))
        for seed in (0, 1)
    ]
    with pytest.raises(ValueError, match=r"made by 2 maps\. Make all of"):
        concatenate_sketches(parts)
    joined = concatenate_sketches([parts[0], parts[0]])
    assert joined.dataset["example_id"][:] == [0, 1, 0, 1]
