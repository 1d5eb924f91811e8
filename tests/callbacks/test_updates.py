"""Rows of updates: what each step, and anything else, did to the weights."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from hf_sketch import load_sketches, load_updates, verify_training
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.ledger.balance import Balance
from tests.helpers.trained.training import (
    Interrupt,
    tiny_bert,
    tiny_trainer,
)

SIZE = 64
DTYPES = {"balance": torch.float64}


class Weights(TrainerCallback):
    """Keeps the trained weights before and after each step of the optimizer."""

    def __init__(self):
        self.before, self.after = [], []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.before.append(weights_of(model))

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        self.after.append(weights_of(model))


class Nudge(TrainerCallback):
    """Changes one weight after a step, as an average of weights or an attack does."""

    def __init__(self, step, size=1e-3):
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters())[0, 0] += self.size


def weights_of(model):
    named = model.named_parameters()
    return {n: p.detach().double() for n, p in copy.deepcopy(dict(named)).items()}


def trained(directory, *callbacks, resume=None, **arguments):
    options = arguments.pop("options", {})
    callback = GradientSketchCallback(SIZE, updates=True, **options)
    trainer = tiny_trainer(directory, *callbacks, callback, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def recorded(directory):
    rows = load_updates(directory).with_format("arrow")[:]  # others round to float32
    return {
        name: torch.tensor(rows[name].to_pylist(), dtype=DTYPES.get(name))
        for name in rows.column_names
    }


def lora():
    torch.manual_seed(0)
    settings = LoraConfig(target_modules=["query", "value"], r=4, task_type="SEQ_CLS")
    return get_peft_model(tiny_bert(), settings)


def in_half():
    return tiny_bert().to(torch.bfloat16)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (tiny_bert, {}),
        (lora, {"row_dtype": "int8", "every_steps": 3}),
        (in_half, {"layout": "blocked"}),
        pytest.param(tiny_bert, {"groups": 2}, marks=pytest.mark.full),
        pytest.param(tiny_bert, {"layout": "flat"}, marks=pytest.mark.full),
        pytest.param(
            tiny_bert, {"per_step": False, "per_example": False}, marks=pytest.mark.full
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_row_is_the_sketch_of_what_the_optimizer_did(tmp_path, model, options):
    weights = Weights()
    trained(tmp_path, weights, model=model(), options=options)
    rows = recorded(tmp_path)
    sketch = load_sketches(tmp_path).model_sketch
    assert rows["by_optimizer"].tolist() == [False, *[True] * 6]
    assert rows["step"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert not rows["sketch"][0].any()
    names = [name for name, _ in sketch.shapes]
    balance = Balance(sketch.row_size, sketch.seed)
    for number, (before, after) in enumerate(
        zip(weights.before, weights.after, strict=True), 1
    ):
        change = sketch.sketch({name: after[name] - before[name] for name in names})
        error = (rows["sketch"][number] - change).norm()
        assert error <= 1e-6 * change.norm()  # 1.5e-7 is float32's rounding
        state = balance.of(sketch.sketch({name: after[name] for name in names}))
        wanted = state.tolist()
        assert rows["balance"][number].tolist() == pytest.approx(wanted, abs=1e-7)
    ends = tmp_path / "checkpoint-2", tmp_path / "checkpoint-6"
    check = verify_training(tmp_path, *ends)
    assert (check.first_step, check.last_step) == (2, 6)
    assert check.problems == ()
    assert check.residual < 1e-6
    whole = verify_training(tmp_path, weights.before[0], weights.after[-1])
    assert (whole.first_step, whole.last_step, whole.problems) == (0, 6, ())


@pytest.mark.parametrize(
    "optim",
    ["sgd", *(pytest.param(o, marks=pytest.mark.full) for o in ("adafactor", "muon"))],
)
def test_any_optimizer_keeps_the_ledger_in_balance(tmp_path, optim):
    own = {} if optim == "muon" else {"optim": optim}
    callback = GradientSketchCallback(SIZE, updates=True)
    trainer = tiny_trainer(tmp_path, callback, weight_decay=0.1, **own)
    if optim == "muon":
        layers = trainer.model.bert.encoder.parameters()
        matrices = [p for p in layers if p.ndim == 2]
        trainer.optimizer = torch.optim.Muon(matrices)
    trainer.train()
    ends = tmp_path / "checkpoint-2", tmp_path / "checkpoint-6"
    check = verify_training(tmp_path, *ends)
    assert check.problems == ()
    assert check.residual < 1e-6


def test_training_is_bit_for_bit_what_it_is_without(tmp_path):
    plain = tiny_trainer(tmp_path / "plain")
    plain.train()
    watched = trained(tmp_path / "watched")
    for one, other in zip(
        plain.model.parameters(), watched.model.parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_a_resumed_run_goes_on_with_the_ledger(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, Interrupt(5))
    trained(tmp_path, resume=True)
    rows = recorded(tmp_path)
    assert rows["step"].tolist() == [0, 1, 2, 3, 4, 4, 5, 6]
    assert rows["by_optimizer"].tolist() == [False, *[True] * 4, False, True, True]
    ends = tmp_path / "checkpoint-2", tmp_path / "checkpoint-6"
    assert verify_training(tmp_path, *ends).problems == ()


def test_a_change_outside_of_the_optimizer_has_a_row_and_is_named(tmp_path):
    trained(tmp_path, Nudge(3))
    rows = recorded(tmp_path)
    (place,) = [
        i for i, s in enumerate(rows["step"].tolist()[:-1]) if rows["step"][i + 1] == s
    ]
    assert rows["step"][place] == 3
    assert not rows["by_optimizer"][place + 1]
    ends = tmp_path / "checkpoint-2", tmp_path / "checkpoint-6"
    (problem,) = verify_training(tmp_path, *ends).problems
    assert "changed by 0.001 after step 3, and not by the optimizer" in problem
    later = tmp_path / "checkpoint-4", tmp_path / "checkpoint-6"
    assert verify_training(tmp_path, *later).problems == ()


@pytest.mark.parametrize("after", [True, False])
def test_a_change_where_a_checkpoint_is_saved_falls_on_its_side(tmp_path, after):
    """Before the checkpoint is saved, or only after it."""
    event = "on_save" if after else "on_step_end"
    nudge = Nudge(4)
    setattr(nudge, event, nudge.on_step_end)
    if after:
        nudge.on_step_end = lambda *event, **kwargs: None
    trained(tmp_path, nudge)
    early = tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"
    late = tmp_path / "checkpoint-4", tmp_path / "checkpoint-6"
    clean, changed = (early, late) if after else (late, early)
    assert verify_training(tmp_path, *clean).problems == ()
    (problem,) = verify_training(tmp_path, *changed).problems
    assert "after step 4, and not by the optimizer" in problem


def test_a_skipped_step_is_recorded_as_no_change(tmp_path):
    class Skip(TrainerCallback):
        """Leaves the optimizer nothing to do, as a scaler of float16 does."""

        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            if state.global_step == 2:
                optimizer.zero_grad()

    trained(tmp_path, Skip(), optim="sgd")
    rows = recorded(tmp_path)
    assert not rows["sketch"][3].any()
    assert rows["by_optimizer"][3]
    ends = tmp_path / "checkpoint-2", tmp_path / "checkpoint-6"
    assert verify_training(tmp_path, *ends).problems == ()


def test_rows_of_updates_are_off_by_default(tmp_path):
    tiny_trainer(tmp_path, GradientSketchCallback(SIZE)).train()
    assert len(load_updates(tmp_path)) == 0
    with pytest.raises(ValueError, match=r"has no updates.*updates=True"):
        verify_training(tmp_path, {}, {})


def test_early_optimizers_are_refused_before_training(tmp_path, monkeypatch):
    from hf_sketch.callbacks.recording import arriving

    monkeypatch.setattr(arriving, "steps_early", lambda *given: True)
    with pytest.raises(ValueError, match=r"does not support DeepSpeed.*updates=False"):
        trained(tmp_path)
    assert not (tmp_path / "sketches").exists()


def test_the_balance_is_linear_and_keeps_norms():
    balance = Balance(2000, 0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 2000, generator=generator, dtype=torch.float64)
    got = balance.of(x)
    torch.testing.assert_close(balance.of(2 * x[:1] - x[1:2]), 2 * got[:1] - got[1:2])
    # The mean of 50 ratios, each with a variance of at most 2 / 16.
    ratio = (got.norm(dim=1) / x.norm(dim=1)).square().mean()
    assert abs(ratio - 1) < 4 * (2 / 16 / 50) ** 0.5
