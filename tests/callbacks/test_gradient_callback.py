import pytest
import torch
from transformers import TrainerCallback

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.callbacks.recording import examples
from tests.helpers.tiers import full
from tests.helpers.trained.training import (
    GradientNotes,
    tiny_bert,
    tiny_dataset,
    tiny_trainer,
)

SIZE = 256


@pytest.fixture(params=["grouped", *full("blocked", "factored")])
def layout(request):
    return request.param


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def columns(dataset):
    return dataset.with_format("torch")[:]


def trained(tmp_path, *callbacks, **arguments):
    trainer = tiny_trainer(tmp_path, *callbacks, **arguments)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "blocked"},
        pytest.param({"layout": "blocked", "operator": "affd"}, marks=pytest.mark.full),
        pytest.param({"per_step": False}, marks=pytest.mark.full),
        pytest.param({"per_example": False}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_training_is_bit_equal_with_and_without(tmp_path, options):
    plain = trained(tmp_path / "plain")
    callback = GradientSketchCallback(SIZE, **options)
    watched = trained(tmp_path / "watched", callback)
    assert losses(plain) == losses(watched)
    for a, b in zip(
        plain.model.state_dict().values(),
        watched.model.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_bf16_training_is_recorded_and_bit_equal(tmp_path):
    plain = trained(tmp_path / "plain", bf16=True)
    watched = trained(tmp_path / "watched", GradientSketchCallback(SIZE), bf16=True)
    assert losses(plain) == losses(watched)
    assert len(load_sketches(tmp_path / "watched").dataset) == 44


def test_step_rows_are_the_gradient_that_the_optimizer_sees(tmp_path, layout):
    notes = GradientNotes()
    trained(tmp_path, GradientSketchCallback(SIZE, layout=layout), notes)
    store = load_sketches(tmp_path)
    steps = columns(store.steps)
    assert steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert steps["epoch"].tolist() == [0, 0, 0, 1, 1, 1]
    for row, gradients in zip(steps["sketch"], notes.gradients, strict=True):
        torch.testing.assert_close(row, store.model_sketch.sketch(gradients))
    after = torch.tensor(
        [
            torch.cat([g.flatten() for g in gradients.values()]).norm()
            for gradients in notes.gradients
        ]
    )
    torch.testing.assert_close(steps["gradient_norm"] * steps["clip_factor"], after)
    expected = (0.5 / (steps["gradient_norm"] + 1e-6)).clamp(max=1.0)
    torch.testing.assert_close(steps["clip_factor"], expected)
    assert (steps["clip_factor"] < 1).any()


def test_unclipped_steps_have_a_factor_of_one(tmp_path):
    trained(tmp_path, GradientSketchCallback(SIZE), max_grad_norm=0.0)
    assert columns(load_sketches(tmp_path).steps)["clip_factor"].tolist() == [1.0] * 6


def test_rounding_is_not_clipping(tmp_path):
    class Rounding(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            for parameter in model.parameters():
                parameter.grad.mul_(1 + 5e-7)

    callbacks = Rounding(), GradientSketchCallback(SIZE)
    trained(tmp_path, *callbacks, max_grad_norm=0.0)
    assert columns(load_sketches(tmp_path).steps)["clip_factor"].tolist() == [1.0] * 6


def assert_weighted_rows_are_gradients(store):
    rows, steps = columns(store.dataset), columns(store.steps)
    for step, sketch, factor in zip(
        steps["step"], steps["sketch"], steps["clip_factor"], strict=True
    ):
        mine = rows["step"] == step
        total = rows["weight"][mine] @ rows["sketch"][mine]
        assert (total - sketch / factor).norm() < 1e-5 * total.norm()


@pytest.mark.parametrize(
    "accumulation", [2, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 3))]
)
def test_the_weighted_rows_of_a_step_are_its_gradient(tmp_path, layout, accumulation):
    callback = GradientSketchCallback(SIZE, layout=layout)
    trained(tmp_path, callback, gradient_accumulation_steps=accumulation)
    store = load_sketches(tmp_path)
    assert_weighted_rows_are_gradients(store)
    rows = columns(store.dataset)
    micro_steps = rows["micro_step"][rows["step"] == 1].unique()
    assert micro_steps.tolist() == list(range(accumulation))


def test_a_module_that_only_some_micro_batches_use(tmp_path):
    class Alternating(torch.nn.ModuleList):
        used = 0

        def forward(self, x):
            self.used += self.training
            return self[0](x) + (self[1](x) if self.used % 2 else 0)

    model = tiny_bert()
    model.classifier = Alternating(torch.nn.Linear(32, 3) for _ in range(2))
    trained(tmp_path, GradientSketchCallback(SIZE), model=model)
    assert_weighted_rows_are_gradients(load_sketches(tmp_path))


def test_rows_are_in_the_units_of_the_example_alone(tmp_path, layout):
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    callback = GradientSketchCallback(SIZE, layout=layout)
    trained(tmp_path, callback, model=model, learning_rate=0.0)
    store = load_sketches(tmp_path)
    data, rows = tiny_dataset(), columns(store.dataset)
    model.eval()
    for index in (0, 20, 43):
        example = data[int(rows["example_id"][index])]
        inputs = {
            name: torch.tensor([example[name]])
            for name in ("input_ids", "attention_mask")
        }
        model.zero_grad()
        loss = model(**inputs, labels=torch.tensor([example["label"]])).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        expected = store.model_sketch.sketch(gradients)
        assert (rows["sketch"][index] - expected).norm() < 1e-4 * expected.norm()
        assert abs(rows["loss"][index] - loss) < 1e-5


def test_each_kind_of_row_can_be_left_out(tmp_path):
    trained(tmp_path / "a", GradientSketchCallback(SIZE, per_step=False))
    trained(tmp_path / "b", GradientSketchCallback(SIZE, per_example=False))
    one, other = load_sketches(tmp_path / "a"), load_sketches(tmp_path / "b")
    assert (len(one.dataset), len(one.steps)) == (44, 0)
    assert (len(other.dataset), len(other.steps)) == (0, 6)


def test_learning_rates_are_those_of_the_steps(tmp_path):
    trainer = trained(tmp_path, GradientSketchCallback(SIZE))
    logged = [e["learning_rate"] for e in trainer.state.log_history if "loss" in e]
    store = load_sketches(tmp_path)
    rows = store.steps.with_format("numpy")["learning_rate"][:]
    assert rows[0] == 1e-3
    # The Trainer logs the rate that the scheduler had before its step, too.
    assert rows.tolist() == pytest.approx(logged)


def test_the_model_and_the_loader_are_left_as_they_were(tmp_path):
    trainer = trained(tmp_path, GradientSketchCallback(SIZE))
    modules = list(trainer.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    for parameter in trainer.model.parameters():
        assert not parameter._post_accumulate_grad_hooks


def test_the_comparison_with_exact_gradients_can_be_left_out(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError

    trained(tmp_path / "measured", GradientSketchCallback(SIZE), max_steps=1)
    assert load_sketches(tmp_path / "measured").measured_error.examples == 3
    monkeypatch.setattr(examples, "measure_error", never)
    callback = GradientSketchCallback(SIZE, measure_error=False)
    trained(tmp_path / "skipped", callback, max_steps=1)
    store = load_sketches(tmp_path / "skipped")
    assert store.measured_error is None
    assert store.dataset[:] == load_sketches(tmp_path / "measured").dataset[:]


def test_nan_gradients_are_kept_flagged_and_reported(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                with torch.no_grad():
                    model.classifier.bias[0] = float("nan")

    trainer = tiny_trainer(
        tmp_path, GradientSketchCallback(SIZE), Poison(), max_steps=2
    )
    with pytest.warns(UserWarning, match=r"of examples \[.*\] are NaN .* at step 2\."):
        trainer.train()
    store = load_sketches(tmp_path)
    assert columns(store.steps)["finite"].tolist() == [True, False]
    assert columns(store.dataset)["finite"].tolist() == [True] * 8 + [False] * 8


def test_step_rows_cover_modules_without_a_rule(tmp_path):
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, notes = tiny_bert(), GradientNotes()
    model.classifier = Scaled(32, 3)
    callback = GradientSketchCallback(SIZE, per_example=False)
    trained(tmp_path, callback, notes, model=model)
    store = load_sketches(tmp_path)
    for row, gradients in zip(
        columns(store.steps)["sketch"], notes.gradients, strict=True
    ):
        torch.testing.assert_close(row, store.model_sketch.sketch(gradients))


def test_label_smoothing_does_not_matter_to_step_rows(tmp_path):
    callback = GradientSketchCallback(SIZE, per_example=False)
    trained(tmp_path, callback, label_smoothing_factor=0.1)
    assert len(load_sketches(tmp_path).steps) == 6


def test_the_steps_of_a_stream_are_recorded(tmp_path):
    stream = tiny_dataset().to_iterable_dataset()
    callback = GradientSketchCallback(SIZE, per_example=False)
    trained(tmp_path, callback, dataset=stream, max_steps=2)
    assert list(load_sketches(tmp_path).steps["step"]) == [1, 2]
