"""What a check of a ledger finds: altered rows, altered weights, another run."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_sketch import load_updates, verify_training
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.cli import main
from hf_sketch.recipes.tables.training.altered_ledgers import (
    DEEDS,
    Alteration,
    altered_store,
)
from tests.helpers.trained.training import Interrupt, tiny_trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two epochs with checkpoints 2, 4 and 6, and the first weights."""
    directory = tmp_path_factory.mktemp("ledger")
    callback = GradientSketchCallback(64, per_example=False, updates=True)
    trainer = tiny_trainer(directory, callback)
    trainer.save_model(directory / "first")
    trainer.train()
    return directory


def ends(run, first=2, last=6):
    return run / f"checkpoint-{first}", run / f"checkpoint-{last}"


def steps_in(problems):
    return {
        int(n) for problem in problems for n in re.findall(r"[Ss]teps? (\d+)", problem)
    }


def altered_weights(checkpoint, target, name="classifier.bias"):
    """Copy a checkpoint with a parameter changed in its first element."""
    target.mkdir(exist_ok=True)
    weights = load_file(checkpoint / "model.safetensors")
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    state = (checkpoint / "trainer_state.json").read_text()
    (target / "trainer_state.json").write_text(state)
    return target


def test_the_whole_run_and_each_part_of_it_balance(run):
    for pair in ((2, 4), (4, 6), (2, 6), (4, 4)):
        check = verify_training(run, *ends(run, *pair))
        assert (check.first_step, check.last_step) == pair
        assert check.problems == ()
        assert check.residual < 1e-6
    check = verify_training(run, run / "first", run / "checkpoint-6")
    assert (check.first_step, check.last_step, check.problems) == (0, 6, ())


@pytest.mark.parametrize("renumbered", [False, True])
@pytest.mark.parametrize("deed", DEEDS)
def test_one_altered_row_is_found_and_located(run, tmp_path, deed, renumbered):
    # The rows of these steps; row 0 begins the run. What has the number 7 is later.
    for place in (3, 4, 5 if renumbered else 6):
        alteration = Alteration(deed, place, 1e-4, renumbered)
        copy = altered_store(run, tmp_path / "copy", alteration)
        problems = verify_training(copy, *ends(run)).problems
        assert problems
        assert {place, place + 1} & steps_in(problems)


def test_a_copy_without_alteration_is_not_suspected(run, tmp_path):
    copy = altered_store(run, tmp_path / "copy", Alteration("scaled", 3, 0.0))
    assert verify_training(copy, *ends(run)).problems == ()


def test_weights_of_a_checkpoint_that_were_changed_are_found(run, tmp_path):
    first, last = ends(run)
    problems = verify_training(run, first, altered_weights(last, tmp_path)).problems
    assert any("after step 6" in problem for problem in problems)
    assert any("do not add up" in problem for problem in problems)
    problems = verify_training(run, altered_weights(first, tmp_path), last).problems
    assert any("after step 2" in problem for problem in problems)


def test_small_changes_late_in_training_are_found(tmp_path):
    """Compared with the steps between the checkpoints, not with all before them."""
    callback = GradientSketchCallback(64, per_example=False, updates=True)

    class Slow(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            if state.global_step >= 4:
                for group in optimizer.param_groups:
                    group["lr"] *= 1e-5

    tiny_trainer(tmp_path, callback, Slow(), learning_rate=1e-2).train()
    first, last = ends(tmp_path, 4, 6)
    check = verify_training(tmp_path, first, last)
    assert check.problems == ()
    weights = load_file(last / "model.safetensors")
    altered = {name: tensor.clone() for name, tensor in weights.items()}
    altered["classifier.weight"] += 0.1 * check.change / 96**0.5
    problems = verify_training(tmp_path, first, altered).problems
    assert any("do not add up" in problem for problem in problems)


def test_a_checkpoint_that_was_changed_before_training_resumed_is_located(tmp_path):
    callback = GradientSketchCallback(64, per_example=False, updates=True)
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(tmp_path, callback, Interrupt(5)).train()
    changed = altered_weights(tmp_path / "checkpoint-4", tmp_path / "changed")
    weights = changed / "model.safetensors"
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(weights.read_bytes())
    callback = GradientSketchCallback(64, per_example=False, updates=True)
    tiny_trainer(tmp_path, callback).train(resume_from_checkpoint=True)
    problems = verify_training(tmp_path, *ends(tmp_path)).problems
    assert any("began after step 4 found other weights" in p for p in problems)


def test_steps_that_were_trained_without_the_callback_are_missing(tmp_path):
    callback = GradientSketchCallback(64, per_example=False, updates=True)
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(tmp_path, callback, Interrupt(3)).train()
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(tmp_path, Interrupt(5)).train(resume_from_checkpoint=True)
    tiny_trainer(tmp_path, callback).train(resume_from_checkpoint=True)
    problems = verify_training(tmp_path, *ends(tmp_path)).problems
    assert "Steps 3 to 4 have no row." in problems


def test_a_frozen_parameter_that_changed_is_named(tmp_path):
    callback = GradientSketchCallback(64, per_example=False, updates=True)
    trainer = tiny_trainer(tmp_path, callback)
    name = "bert.embeddings.word_embeddings.weight"
    trainer.model.get_parameter(name).requires_grad_(False)
    trainer.train()
    first, last = ends(tmp_path)
    assert verify_training(tmp_path, first, last).problems == ()
    changed = altered_weights(last, tmp_path / "changed", name)
    (problem,) = verify_training(tmp_path, first, changed).problems
    assert problem == f"The frozen parameter {name} differs between the checkpoints."


def test_what_cannot_be_compared_is_an_error(run, tmp_path):
    first, last = ends(run)
    with pytest.raises(ValueError, match=r"comes before .* Swap the two checkpoints"):
        verify_training(run, last, first)
    with pytest.raises(
        FileNotFoundError, match=r"has no model\.safetensors.*checkpoint-"
    ):
        verify_training(run, tmp_path, last)
    with pytest.raises(ValueError, match=r"has no parameter 'bert.*named_parameters"):
        verify_training(run, {"x": torch.ones(2)}, last)
    weights = load_file(last / "model.safetensors")
    weights["classifier.bias"] = torch.ones(9)
    with pytest.raises(ValueError, match=r"with shape \(9,\).*recorded training"):
        verify_training(run, first, weights)


def test_the_first_change_that_is_not_finite_is_named(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    next(model.parameters())[0, 0] = torch.nan

    callback = GradientSketchCallback(64, per_example=False, updates=True)
    tiny_trainer(tmp_path, Break(), callback).train()
    problems = verify_training(tmp_path, *ends(tmp_path)).problems
    (named,) = (problem for problem in problems if "NaN" in problem)
    assert named == "The update of step 3 is NaN or infinite."
    assert any("do not add up" in problem for problem in problems)


def test_the_command_prints_the_residual_or_what_is_wrong(run, tmp_path, capsys):
    first, last = map(str, ends(run))
    main(["verify", str(run), "--from", first, "--to", last])
    printed = capsys.readouterr().out
    assert re.search(
        r"steps 3 to 6: the updates add up .* \(residual \d\.\de-0\d", printed
    )
    copy = altered_store(run, tmp_path / "copy", Alteration("dropped", 4))
    with pytest.raises(SystemExit, match="1"):
        main(["verify", str(copy), "--from", first, "--to", last, "--json"])
    assert "Step 4 has no row." in json.loads(capsys.readouterr().out)
    with pytest.raises(ValueError, match="takes --from and --to together"):
        main(["verify", str(run), "--from", first])


def test_updates_go_where_the_other_rows_go(run, tmp_path, capsys):
    main(["info", str(run)])
    assert "update: 7 rows in 3 files" in capsys.readouterr().out
    output = tmp_path / "exported"
    main(["export", str(run), "--to", "parquet", "--output_dir", str(output)])
    assert (output / "update.parquet").is_file()
    merged = tmp_path / "merged"
    main(["merge", str(run), "--output_dir", str(merged)])
    assert len(load_updates(merged)) == 7
    main(["compact", str(merged)])
    assert verify_training(merged, *ends(run)).problems == ()
