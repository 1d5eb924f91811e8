import warnings

import pytest
import torch
from transformers import TrainerCallback

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from tests.conftest import tiny_bert, tiny_dataset, tiny_trainer

SIZE = 256


@pytest.fixture(params=["blocked", "factored"])
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


class BatchNotes(TrainerCallback):
    """Notes the first token of each training row: the row's number plus one."""

    def __init__(self):
        self.rows = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        def note(module, args, kwargs):
            if module.training:
                self.rows += (kwargs["input_ids"][:, 0] - 1).tolist()

        self.handle = model.register_forward_pre_hook(note, with_kwargs=True)


class GradientNotes(TrainerCallback):
    """Keeps the gradients that the optimizer gets."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append(
            {name: p.grad.clone() for name, p in model.named_parameters()}
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "blocked"},
        {"layout": "blocked", "operator": "affd"},
        {"per_step": False},
        {"per_example": False},
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


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_the_weighted_rows_of_a_step_are_its_gradient(tmp_path, layout, accumulation):
    callback = GradientSketchCallback(SIZE, layout=layout)
    trained(tmp_path, callback, gradient_accumulation_steps=accumulation)
    store = load_sketches(tmp_path)
    rows, steps = columns(store.dataset), columns(store.steps)
    for step, sketch, factor in zip(
        steps["step"], steps["sketch"], steps["clip_factor"], strict=True
    ):
        mine = rows["step"] == step
        total = rows["weight"][mine] @ rows["sketch"][mine]
        assert (total - sketch / factor).norm() < 1e-5 * total.norm()
    micro_steps = rows["micro_step"][rows["step"] == 1].unique()
    assert micro_steps.tolist() == list(range(accumulation))


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


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 1},
        {"dataloader_num_workers": 2},
        {"dataloader_drop_last": True},
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "sequential"},
        {"max_steps": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_example_ids_are_row_numbers(tmp_path, arguments, remove_unused_columns):
    dataset, notes = tiny_dataset(), BatchNotes()
    if not remove_unused_columns:
        dataset = dataset.remove_columns("text")
    trainer = trained(
        tmp_path,
        notes,
        GradientSketchCallback(SIZE),
        dataset=dataset,
        remove_unused_columns=remove_unused_columns,
        **arguments,
    )
    rows = columns(load_sketches(tmp_path).dataset)
    assert rows["example_id"].tolist() == notes.rows
    sampler = trainer.get_train_dataloader().batch_sampler.sampler
    assert type(sampler).__module__ != "hf_sketch.callbacks.example_ids"
    first_epoch = rows["example_id"][rows["epoch"] == 0]
    assert len(first_epoch.unique()) == len(first_epoch)


def test_duplicate_examples_have_rows_of_their_own(tmp_path):
    dataset = tiny_dataset().select([3] * 8)
    trained(tmp_path, GradientSketchCallback(SIZE), dataset=dataset, max_steps=1)
    ids = columns(load_sketches(tmp_path).dataset)["example_id"]
    assert sorted(ids.tolist()) == list(range(8))


@pytest.mark.parametrize("every_steps", [2, 4])
def test_only_every_nth_step_is_recorded_with_the_right_ids(tmp_path, every_steps):
    notes = BatchNotes()
    callback = GradientSketchCallback(SIZE, every_steps=every_steps)
    trained(tmp_path, notes, callback)
    store = load_sketches(tmp_path)
    wanted = [step for step in range(1, 7) if step % every_steps == 0]
    assert columns(store.steps)["step"].tolist() == wanted
    # Steps 1 to 6 take 8, 8, 6, 8, 8 and 6 examples of the two epochs.
    starts = {1: 0, 2: 8, 3: 16, 4: 22, 5: 30, 6: 38, 7: 44}
    expected = [
        row for step in wanted for row in notes.rows[starts[step] : starts[step + 1]]
    ]
    assert columns(store.dataset)["example_id"].tolist() == expected


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


def test_nan_gradients_are_kept_flagged_and_told(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                with torch.no_grad():
                    model.classifier.bias[0] = float("nan")

    trainer = tiny_trainer(
        tmp_path, GradientSketchCallback(SIZE), Poison(), max_steps=2
    )
    with pytest.warns(UserWarning, match=r"step 2: the gradients of examples \[.*\]"):
        trainer.train()
    store = load_sketches(tmp_path)
    assert columns(store.steps)["finite"].tolist() == [True, False]
    assert columns(store.dataset)["finite"].tolist() == [True] * 8 + [False] * 8


def test_a_gradient_that_is_not_covered_stops_the_first_step(tmp_path):
    model = tiny_bert()

    class Hidden(TrainerCallback):
        """Adds a gradient behind the modules' back."""

        def on_substep_end(self, args, state, control, model, **kwargs):
            model.classifier.weight.grad += 1.0

    trainer = tiny_trainer(
        tmp_path, Hidden(), GradientSketchCallback(SIZE), model=model
    )
    with pytest.raises(RuntimeError, match="must add up to the step's gradient"):
        trainer.train()


def refused(tmp_path, match, *, callback=None, error=ValueError, **arguments):
    callback = callback or GradientSketchCallback(SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the settings that are refused
        trainer = tiny_trainer(tmp_path, callback, **arguments)
        with pytest.raises(error, match=match):
            trainer.train()
    assert trainer.state.global_step == 0


def test_bad_arguments_are_refused_at_once():
    for size in (0, -1):
        with pytest.raises(
            ValueError, match=f"out_size must be at least 1, got {size}"
        ):
            GradientSketchCallback(size)
    with pytest.raises(ValueError, match="every_steps must be at least 1, got 0"):
        GradientSketchCallback(SIZE, every_steps=0)
    with pytest.raises(ValueError, match="got False for both: leave the callback out"):
        GradientSketchCallback(SIZE, per_step=False, per_example=False)
    with pytest.raises(ValueError, match=r"layout must be one of .*, got 'round'"):
        GradientSketchCallback(SIZE, layout="round")
    with pytest.raises(ValueError, match=r"operator must be one of .*, got 'jl'"):
        GradientSketchCallback(SIZE, operator="jl")


def test_a_model_that_does_not_fit_is_refused_before_training(tmp_path):
    size = sum(p.numel() for p in tiny_bert().parameters())
    too_long = GradientSketchCallback(size + 1)
    refused(tmp_path, rf"\[1, {size}\].*got {size + 1}", callback=too_long)
    model = tiny_bert()
    model.bert.embeddings.word_embeddings.max_norm = 1.0
    refused(tmp_path, "Embedding without max_norm", model=model)


def test_a_model_without_trainable_parameters_is_refused(tmp_path):
    model = tiny_bert().requires_grad_(False)
    refused(tmp_path, "at least one trainable parameter, got none", model=model)


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


def test_compiled_training_is_refused(tmp_path):
    refused(tmp_path, "got torch_compile=True: train without", torch_compile=True)


def test_label_smoothing_does_not_matter_to_step_rows(tmp_path):
    callback = GradientSketchCallback(SIZE, per_example=False)
    trained(tmp_path, callback, label_smoothing_factor=0.1)
    assert len(load_sketches(tmp_path).steps) == 6


def test_the_steps_of_a_stream_are_recorded(tmp_path):
    stream = tiny_dataset().to_iterable_dataset()
    callback = GradientSketchCallback(SIZE, per_example=False)
    trained(tmp_path, callback, dataset=stream, max_steps=2)
    assert list(load_sketches(tmp_path).steps["step"]) == [1, 2]


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "sketches").write_text("a file where the directory should be")
    message = "cannot be written to .*: give the Trainer an output_dir"
    refused(tmp_path, message, error=OSError)


def test_a_store_of_other_settings_is_refused_and_kept(tmp_path):
    trained(tmp_path, GradientSketchCallback(SIZE))
    before = load_sketches(tmp_path).dataset[:]
    other = GradientSketchCallback(SIZE // 2)
    message = r"holds rows of out_size=256, .* given out_size=128.*: pass the store's"
    refused(tmp_path, message, callback=other)
    assert load_sketches(tmp_path).dataset[:] == before


def test_resuming_with_other_settings_is_refused(tmp_path):
    trained(tmp_path, GradientSketchCallback(SIZE))
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE // 2))
    with pytest.raises(
        ValueError, match=r"holds rows of out_size=256, .* was given out_size=128"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(load_sketches(tmp_path).dataset) == 44
