"""What is reported before training starts, and what a dry run leaves behind."""

import logging
import random
import re

import numpy as np
import pytest
import torch
from datasets import IterableDataset

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback, HessianSpectrumCallback
from tests.helpers.trained.training import tiny_bert, tiny_dataset, tiny_trainer

SIZE = 64
LOGGER = "hf_sketch.callbacks.gradient"


def logged(caplog, trainer):
    with caplog.at_level(logging.INFO, LOGGER):
        trainer.train()
    (line,) = [x.getMessage() for x in caplog.records if x.name == LOGGER]
    assert "\n" not in line
    return line


def number(line, name):
    return int(re.search(rf"{name}: ([\d,]+)", line)[1].replace(",", ""))


def stored_bytes(output_dir):
    files = (output_dir / "sketches").iterdir()
    return sum(path.stat().st_size for path in files if path.name != "header.json")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"every_steps": 2, "row_dtype": "int8"},
        {"every_steps": 3},
        {"per_step": False},
        {"per_example": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("drop_last", [False, True])
def test_one_line_says_before_training_what_will_be_there(
    tmp_path, caplog, settings, drop_last
):
    recording = GradientSketchCallback(SIZE, **settings)
    trainer = tiny_trainer(tmp_path, recording, dataloader_drop_last=drop_last)
    line = logged(caplog, trainer)
    store = load_sketches(tmp_path)
    assert number(line, "rows of examples") == len(store.dataset)
    assert number(line, "rows of steps") == len(store.steps)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    elements = sum(p.numel() for p in parameters)
    assert f"parameters: {len(parameters)} ({elements:,} elements)" in line
    reported = re.search(r"bytes on disk: about ([\d.]+) kB", line)
    assert float(reported[1]) * 1000 == pytest.approx(stored_bytes(tmp_path), rel=0.2)


def test_modules_are_counted_by_how_their_gradients_are_read(tmp_path, caplog):
    class Scaled(torch.nn.Linear):
        """A bare parameter, which no rule knows."""

        def __init__(self):
            super().__init__(32, 32)
            self.factor = torch.nn.Parameter(torch.ones(32))

        def forward(self, x):
            return super().forward(x) * self.factor

    model = tiny_bert()
    model.bert.pooler.dense = Scaled()
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE), model=model)
    line = logged(caplog, trainer)
    owners = [m for m in model.modules() if any(True for _ in m.parameters(False))]
    assert number(line, "modules by rule") == len(owners) - 1
    assert number(line, "modules run again per example") == 1


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            GradientSketchCallback(SIZE, every_steps=7),
            "every_steps .* at most 6.*got 7",
        ),
        (HessianSpectrumCallback([7, 9]), r"steps must be at most 6.*got \[7, 9\]"),
        (HessianSpectrumCallback([]), r"steps must be at most 6.*got \[\]"),
    ],
    ids=["gradient", "hessian", "none"],
)
def test_steps_beyond_the_run_are_refused_before_the_first(tmp_path, callback, message):
    trainer = tiny_trainer(tmp_path, callback)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def generators():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()


def states_of(model):
    modes = [module.training for module in model.modules()]
    tensors = [x.clone() for x in model.state_dict(keep_vars=False).values()]
    return modes, tensors


def assert_equal_states(before, after):
    assert before[0] == after[0]
    assert all(map(torch.equal, before[1], after[1]))


class Counting(torch.nn.Module):
    """A buffer that each forward pass changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


def counting_bert():
    model = tiny_bert()
    model.dropout = torch.nn.Sequential(Counting(), model.dropout)
    return model.eval()


def test_a_dry_run_leaves_no_trace(tmp_path, capsys):
    recording = GradientSketchCallback(SIZE)
    trainer = tiny_trainer(tmp_path, recording, model=counting_bert())
    before, model = generators(), states_of(trainer.model)
    attributes = dict(vars(trainer))
    files = sorted(tmp_path.rglob("*"))
    found = recording.dry_run(trainer)
    after = generators()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert_equal_states(model, states_of(trainer.model))
    assert all(p.grad is None for p in trainer.model.parameters())
    assert not any(
        (*m._forward_hooks, *m._forward_pre_hooks) for m in trainer.model.modules()
    )
    assert vars(trainer) == attributes
    assert trainer.optimizer is None
    assert sorted(tmp_path.rglob("*")) == files
    assert str(found) in capsys.readouterr().out


def rows_of(trainer, output_dir):
    trainer.train()
    store = load_sketches(output_dir)
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    return losses, store.dataset[:], store.steps[:]


def test_training_after_a_dry_run_is_bit_for_bit_that_without(tmp_path):
    """Also of a collator with random numbers of its own."""

    class Replacing:
        def __init__(self):
            self.generator = torch.Generator().manual_seed(1)

        def __call__(self, examples):
            batch = {n: torch.tensor([x[n] for x in examples]) for n in examples[0]}
            batch["labels"] = batch.pop("label")
            place = torch.randint(11, (1,), generator=self.generator)
            batch["input_ids"][:, place] = 3
            return batch

    results = []
    for name in ("plain", "tried"):
        trainer = tiny_trainer(tmp_path / name, GradientSketchCallback(SIZE))
        trainer.data_collator = Replacing()
        if name == "tried":
            GradientSketchCallback.dry_run(trainer)
        results.append(rows_of(trainer, tmp_path / name))
    assert results[0] == results[1]


@pytest.mark.parametrize("groups", [1, 3])
def test_a_dry_run_says_what_the_run_then_records(tmp_path, groups):
    callback = GradientSketchCallback(
        SIZE, every_steps=2, groups=groups, row_dtype="int8"
    )
    trainer = tiny_trainer(tmp_path, callback)
    found = GradientSketchCallback.dry_run(trainer)
    trainer.train()
    store = load_sketches(tmp_path)
    assert found.forecast.example_rows == len(store.dataset)
    assert found.forecast.step_rows == len(store.steps)
    written = sum(path.stat().st_size for path in store.directory.glob("*.arrow"))
    manifest = (store.directory / "manifest-00000.jsonl").stat().st_size
    assert found.forecast.total_bytes == pytest.approx(written + manifest, rel=0.03)
    assert found.plain_seconds > 0
    assert found.slowdown == found.recorded_seconds / found.plain_seconds
    assert "a recorded batch" in str(found)


def test_gradients_that_were_there_before_a_dry_run_are_kept(tmp_path):
    recording = GradientSketchCallback(SIZE, per_example=False)
    trainer = tiny_trainer(tmp_path, recording)
    gradient = torch.ones(3)
    trainer.model.classifier.bias.grad = gradient
    found = GradientSketchCallback.dry_run(trainer)
    assert trainer.model.classifier.bias.grad is gradient
    assert gradient.tolist() == [1.0] * 3
    assert found.forecast.example_rows == 0


def test_a_dry_run_refuses_what_training_would_refuse(tmp_path):
    def dry_run(*callbacks, **settings):
        trainer = tiny_trainer(tmp_path, *callbacks, **settings)
        GradientSketchCallback.dry_run(trainer)

    with pytest.raises(ValueError, match=r"has no GradientSketchCallback\. Add one"):
        dry_run()
    with pytest.raises(ValueError, match=r"every_steps must be at most 6, .* got 9"):
        dry_run(GradientSketchCallback(SIZE, every_steps=9))
    model = tiny_bert()
    model.bert.embeddings.word_embeddings.max_norm = 1.0
    with pytest.raises(ValueError, match="Embedding without max_norm"):
        dry_run(GradientSketchCallback(SIZE), model=model)


def test_a_dry_run_of_a_model_that_will_be_sharded_is_refused(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE))
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match=r"FSDP and DeepSpeed .* max_steps=1"):
        GradientSketchCallback.dry_run(trainer)


def stream():
    def examples():
        yield from tiny_dataset(16).remove_columns("text")

    return IterableDataset.from_generator(examples)


@pytest.mark.parametrize("checkpoint", [2, 4])
def test_a_stream_that_the_trainer_restarts_is_named(tmp_path, checkpoint, recwarn):
    """Within its first pass a stream continues where it was."""
    for resumed in (None, str(tmp_path / f"checkpoint-{checkpoint}")):
        recording = GradientSketchCallback(SIZE, per_example=False)
        trainer = tiny_trainer(tmp_path, recording, dataset=stream(), max_steps=6)
        recwarn.clear()
        if resumed and checkpoint == 4:
            message = r"restarts the stream: .* after 4 are not .* Give the dataset"
            with pytest.warns(UserWarning, match=message):
                trainer.train(resume_from_checkpoint=resumed)
        else:
            trainer.train(resume_from_checkpoint=resumed)
            assert not [w for w in recwarn if "restarts" in str(w.message)]
