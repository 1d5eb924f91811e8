"""Training that records rows with a sketch of each group of layers."""

import pytest
import torch

from hf_sketch import ModelSketch, load_sketches, sketch_dataset
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.store.blocks import sketch_matrix
from tests.helpers.rows import columns, rows_of
from tests.helpers.trained.training import Interrupt, tiny_bert, tiny_trainer

SIZE = 64
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
HEAD = "pooler|classifier"


def callback(**settings):
    return GradientSketchCallback(SIZE, groups=4, **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    trainer = tiny_trainer(directory, callback(), model=tiny_bert(**CALM))
    trainer.train()
    return trainer, directory


def test_rows_are_sketches_of_each_groups_gradient(trained):
    """Those of the first step, by autograd in float64 at the first weights."""
    trainer, directory = trained
    store = load_sketches(directory)
    model = tiny_bert(**CALM).double()
    groups = list(store.model_sketch.layer_groups.columns)
    assert len(groups) == 4
    rows = columns(store.where(step=1).dataset)
    assert rows["sketch"].shape == (8, 4 * SIZE)
    weighted = torch.zeros(4 * SIZE, dtype=torch.float64)
    for index, row, weight in zip(
        rows["example_id"], rows["sketch"], rows["weight"], strict=True
    ):
        example = trainer.data_collator([trainer.train_dataset[int(index)]])
        example.pop("text", None)
        model.zero_grad()
        model(**example).loss.backward()
        for group, part in zip(groups, row.view(4, SIZE), strict=True):
            own = {
                name: p.grad
                for name, p in model.named_parameters()
                if store.model_sketch.layer_groups.of[name] == group
            }
            at = store.model_sketch.layer_groups.columns[group]
            expected = store.model_sketch.sketch(own)
            assert expected.count_nonzero() == expected[at].count_nonzero() > 0
            error = (part - expected[at]).norm()
            assert error < 1e-4 * expected.norm()
            weighted[at] += weight * expected[at]
    step = columns(store.steps)
    torch.testing.assert_close(
        step["sketch"][0].double() / step["clip_factor"][0],
        weighted,
        rtol=1e-4,
        atol=1e-5 * float(weighted.norm()),
    )


def test_queries_have_the_groups_of_the_store(trained):
    trainer, directory = trained
    store = load_sketches(directory)
    data = trainer.train_dataset.select(range(3)).remove_columns("text")
    queries = sketch_dataset(trainer.model, data, store.model_sketch)
    sizes = [len(part) for part in sketch_matrix(queries.dataset)]
    assert sizes == [4 * SIZE] * 3
    name = [*store.model_sketch.layer_groups.columns][-1]
    at = store.model_sketch.layer_groups.columns[name]
    got = store.scores(queries, "dot", layers=[name])
    expected = (
        sketch_matrix(queries.dataset)[:, at] @ sketch_matrix(store.dataset)[:, at].T
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    plain = ModelSketch.from_model(trainer.model, 4 * SIZE, "grouped", seed=7)
    with pytest.raises(ValueError, match="another map"):
        store.attribute(sketch_dataset(trainer.model, data, plain))


@pytest.mark.parametrize("row_dtype", ["float32", "int8"])
def test_an_interrupted_run_goes_on_with_its_groups(tmp_path, row_dtype):
    tiny_trainer(tmp_path / "whole", callback(row_dtype=row_dtype)).train()
    directory = tmp_path / "parts"
    stopped = tiny_trainer(directory, callback(row_dtype=row_dtype), Interrupt(4))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    trainer = tiny_trainer(directory, callback(row_dtype=row_dtype))
    trainer.train(resume_from_checkpoint=True)
    expected, count = {str(x) for x in rows_of(tmp_path / "whole")[0]}, 50
    assert {str(x) for x in rows_of(directory)[0]} == expected
    assert len(expected) == count


def test_groups_are_divided_by_adams_moments_too(tmp_path):
    """As the parts of the same gradients that no group divides."""
    tiny_trainer(tmp_path, model=tiny_bert(**CALM)).train()
    groups = {"head": HEAD, "rest": None}
    settings = {"normalize": "adam", "groups": groups}
    trainer = tiny_trainer(
        tmp_path, GradientSketchCallback(SIZE, **settings), model=tiny_bert(**CALM)
    )
    start = tmp_path / "checkpoint-2"
    trainer.train(resume_from_checkpoint=str(start))
    store = load_sketches(tmp_path)
    sketch = store.model_sketch
    model = tiny_bert(**CALM).from_pretrained(start, **CALM)
    rows = columns(store.where(step=3).dataset)
    for index, row in zip(rows["example_id"], rows["sketch"], strict=True):
        example = trainer.data_collator([trainer.train_dataset[int(index)]])
        example.pop("text", None)
        model.zero_grad()
        model(**example).loss.backward()
        divided = {
            name: sketch.normalizer.scale(name, p.grad.reshape(1, -1)).view_as(p)
            for name, p in model.named_parameters()
        }
        plain = ModelSketch.from_model(model, SIZE, "grouped", 7, groups=groups)
        expected = plain.sketch(divided)
        assert (row - expected).norm() < 0.05 * expected.norm()
