import json

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from hf_sketch import SubspaceConfig, load_dimension_search
from hf_sketch.callbacks import IntrinsicDimensionCallback
from hf_sketch.report.plots import plot_dimension_search
from hf_sketch.subspace.search import (
    DimensionSearch,
    save_dimension_search,
    target_of,
)
from tests.helpers.trained.training import (
    Interrupt,
    tiny_bert,
    tiny_dataset,
    tiny_trainer,
)


def listing_9(metrics, start, largest, target, delta):
    """The paper's search over given evaluations; (D*, the dimension of each stage)."""
    dim, old, dims = start, metrics[0], []
    for new in metrics[1:]:
        dims.append(dim)
        if new >= target:
            return dim, dims
        if new - old < delta:
            dim *= 2
            if dim > largest:
                return None, dims
        old = new
    return None, dims


@pytest.mark.parametrize("seed", range(20))
def test_the_search_takes_the_papers_path(seed):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(40, generator=generator) * 0.1 - 0.02
    metrics = steps.cumsum(0).tolist()
    search = DimensionSearch(0.9, "eval_accuracy", 64, 10, 0.03)
    dims = []
    for number, metric in enumerate(metrics):
        dim = search.next_dim() if search.path else 4
        search = search.after(10 * number, dim, metric)
        dims += [dim] if number else []
        if search.ended:
            break
    assert (search.dimension, dims) == listing_9(metrics, 4, 64, 0.9, 0.03)


def test_lower_can_be_better():
    search = DimensionSearch(1.0, "eval_loss", 64, 10, 0.1, greater_is_better=False)
    search = search.after(0, 4, 3.0).after(10, 4, 2.5).after(20, 4, 2.45)
    assert [stage.decision for stage in search.path] == ["start", "continue", "double"]
    assert search.after(30, 8, 0.99).dimension == 8
    assert search.after(30, 8, float("nan")).path[-1].decision == "double"


def test_nothing_is_left_above_the_largest_dimension():
    search = DimensionSearch(1.0, "eval_accuracy", 6, 10, 0.1)
    search = search.after(0, 4, 0.1).after(10, 4, 0.1)
    assert search.next_dim() == 6
    search = search.after(20, 6, 0.1)
    assert search.path[-1].decision == "exhausted"
    assert (search.ended, search.dimension) == (True, None)


def test_the_target_is_a_share_of_full_fine_tuning():
    assert target_of(None, 0.8) == pytest.approx(0.72)
    assert target_of(None, 1.8, greater_is_better=False) == pytest.approx(2.0)
    assert target_of(0.7, 0.8) == 0.7
    with pytest.raises(ValueError, match=r"reaches, 0\.8, got 0\.85: pass a target up"):
        target_of(0.85, 0.8)
    with pytest.raises(ValueError, match="neither target nor baseline: pass"):
        target_of(None, None)
    with pytest.raises(ValueError, match=r"got -2.0: pass the target"):
        target_of(None, -2.0)
    assert target_of(-1.5, -1.0) == -1.5


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"stage_steps": 0}, "stage_steps must be an integer of at least 1, got 0"),
        ({"min_improvement": -1.0}, "min_improvement must be .* at least 0, got -1.0"),
        ({"min_improvement": float("nan")}, "min_improvement .* finite .*, got nan"),
        ({"target": float("nan")}, "target must be a finite number .*, got nan"),
        ({"target": None, "baseline": "3"}, "baseline must be .* number .*, got '3'"),
        ({"metric": 5}, "metric must be a string, got 5"),
        ({"start_dim": 0.5}, "start_dim must be an integer .*, got 0.5"),
        ({"max_dim": 0}, "max_dim must be an integer of at least 1 or None, got 0"),
        ({"greater_is_better": "no"}, "greater_is_better must be True or .*, got 'no'"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        IntrinsicDimensionCallback(**{"target": 0.9, **settings})


def test_a_stored_search_is_loaded_and_checked(tmp_path):
    search = DimensionSearch(0.9, "eval_accuracy", 64).after(0, 4, 0.5)
    path = save_dimension_search(tmp_path, search)
    assert load_dimension_search(tmp_path) == search
    text = path.read_text()
    path.write_text(text.replace('"target": 0.9', '"target": 0.8'))
    with pytest.raises(ValueError, match=r"must have the digest .* search again"):
        load_dimension_search(tmp_path)
    with pytest.raises(FileNotFoundError, match="train with IntrinsicDimension"):
        load_dimension_search(tmp_path / "nothing")


def test_the_plot_marks_doublings():
    search = DimensionSearch(0.9, "eval_accuracy", 64, 10, 0.1)
    for step, dim, metric in ((0, 4, 0.3), (10, 4, 0.3), (20, 8, 0.5), (30, 8, 0.95)):
        search = search.after(step, dim, metric)
    axes = plot_dimension_search(search).axes[0]
    assert [text.get_text() for text in axes.texts] == ["4", "8"]
    assert axes.get_legend().get_texts()[0].get_text() == "target 0.9"
    assert list(axes.lines[0].get_ydata()) == [0.3, 0.3, 0.5, 0.95]
    with pytest.raises(ValueError, match="needs an evaluation to be drawn"):
        plot_dimension_search(DimensionSearch(0.9, "eval_accuracy", 64))


SETTINGS = {"target": 0.2, "metric": "eval_loss", "greater_is_better": False}
SETTINGS |= {"stage_steps": 4, "min_improvement": 0.003}


class Dims(TrainerCallback):
    def __init__(self):
        self.dims = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.dims.append(len(model.base_model.omega))


def search_trainer(directory, *callbacks, search=None, **arguments):
    config = SubspaceConfig(dim=4, max_dim=64, seed=1)
    model = get_peft_model(tiny_bert(), config)
    search = search or IntrinsicDimensionCallback(**SETTINGS)
    settings = {"max_steps": 30, "learning_rate": 1e-2, "save_steps": 3, **arguments}
    dataset = tiny_dataset(8)
    return tiny_trainer(
        directory,
        search,
        *callbacks,
        model=model,
        eval_dataset=dataset,
        **settings,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing cut: its Trainer, its folder and omega's length by step."""
    directory, dims = tmp_path_factory.mktemp("whole"), Dims()
    trainer = search_trainer(directory, dims)
    trainer.train()
    return trainer, directory, dims.dims


def test_the_trainer_searches_in_one_run(whole):
    trainer, directory, dims = whole
    search = load_dimension_search(directory)
    assert [stage.step for stage in search.path] == list(range(0, 29, 4))
    assert len({stage.metric for stage in search.path}) == len(search.path)
    doubled = [stage.step for stage in search.path if stage.decision == "double"]
    expected = [4 * 2 ** sum(at < step for at in doubled) for step in range(1, 31)]
    assert doubled
    assert dims == expected
    logged = [log for log in trainer.state.log_history if "subspace_dim" in log]
    assert [log["subspace_dim"] for log in logged] == [s.dim for s in search.path]
    evaluated = [
        log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log
    ]
    assert evaluated == [stage.metric for stage in search.path]
    content = json.loads((directory / "intrinsic_dimension.json").read_text())
    assert content["dimension"] is None


def test_reaching_the_target_stops_training(tmp_path):
    first = {**SETTINGS, "target": 100.0}
    trainer = search_trainer(tmp_path, search=IntrinsicDimensionCallback(**first))
    with pytest.warns(UserWarning, match=r"before training, got .*: a search from"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert load_dimension_search(tmp_path).dimension == 4


# At 8, after the checkpoint, it doubles.
@pytest.mark.parametrize("step", [9, pytest.param(17, marks=pytest.mark.full)])
def test_a_search_resumes_in_the_middle_of_a_stage(whole, tmp_path, step):
    with pytest.raises(KeyboardInterrupt):
        search_trainer(tmp_path / "cut", Interrupt(step)).train()
    search_trainer(tmp_path / "cut").train(resume_from_checkpoint=True)
    assert load_dimension_search(tmp_path / "cut") == load_dimension_search(whole[1])
    other = IntrinsicDimensionCallback(**{**SETTINGS, "stage_steps": 5})
    resumed = search_trainer(tmp_path / "cut", search=other, max_steps=40)
    with pytest.raises(ValueError, match="resume with the same settings"):
        resumed.train(resume_from_checkpoint=True)


def test_a_search_that_ended_does_not_go_on(tmp_path):
    first = {**SETTINGS, "target": 100.0, "stage_steps": 3}
    with pytest.warns(UserWarning, match="says nothing"):
        search_trainer(tmp_path, search=IntrinsicDimensionCallback(**first)).train()
    again = search_trainer(tmp_path, search=IntrinsicDimensionCallback(**first))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step <= 4
    assert load_dimension_search(tmp_path).dimension == 4


def test_an_unknown_metric_is_refused_before_the_first_step(tmp_path):
    callback = IntrinsicDimensionCallback(0.9, "eval_accuracy", stage_steps=4)
    trainer = search_trainer(tmp_path, search=callback)
    with pytest.raises(ValueError, match=r"'eval_accuracy', got .*'eval_loss'"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_stages_longer_than_the_run_are_refused_before_the_first_step(tmp_path):
    callback = IntrinsicDimensionCallback(**{**SETTINGS, "stage_steps": 31})
    trainer = search_trainer(tmp_path, search=callback)
    with pytest.raises(ValueError, match=r"stage_steps must be at most 30, .* got 31"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_search_needs_a_subspace_of_its_size(tmp_path):
    callback = IntrinsicDimensionCallback(**SETTINGS, max_dim=128)
    with pytest.raises(ValueError, match=r"at most 64, .*SubspaceConfig\(max_dim=128"):
        search_trainer(tmp_path, search=callback).train()
    trainer = tiny_trainer(
        tmp_path, IntrinsicDimensionCallback(**SETTINGS), eval_dataset=tiny_dataset(4)
    )
    with pytest.raises(TypeError, match="got BertForSequenceClassification: call"):
        trainer.train()


def test_the_search_starts_at_the_given_dimension(tmp_path):
    callback = IntrinsicDimensionCallback(**SETTINGS, start_dim=8, max_dim=16)
    search_trainer(tmp_path, search=callback, max_steps=5).train()
    search = load_dimension_search(tmp_path)
    assert (search.path[0].dim, search.max_dim) == (8, 16)
