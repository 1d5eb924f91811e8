"""What the callback refuses, and when: before any training time is spent, if it can."""

import warnings

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, ParallelismConfig
from transformers import TrainerCallback

import hf_sketch.callbacks.placement as processes_module
import hf_sketch.callbacks.recording.steps as steps_module
from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.trained.training import tiny_bert, tiny_trainer

SIZE = 256


def refused(tmp_path, match, *, callback=None, error=ValueError, **arguments):
    callback = callback or GradientSketchCallback(SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the settings that are refused
        trainer = tiny_trainer(tmp_path, callback, **arguments)
        with pytest.raises(error, match=match):
            trainer.train()
    assert trainer.state.global_step == 0


def test_a_gradient_that_is_not_covered_stops_the_first_step(tmp_path):
    model = tiny_bert()

    class Hidden(TrainerCallback):
        """Adds a gradient behind the modules' back."""

        def on_substep_end(self, args, state, control, model, **kwargs):
            model.classifier.weight.grad += 1.0

    trainer = tiny_trainer(
        tmp_path, Hidden(), GradientSketchCallback(SIZE), model=model
    )
    with pytest.raises(RuntimeError, match="do not add up to the step's gradient"):
        trainer.train()


def test_a_refused_layout_of_shards_leaves_no_hooks(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no shards")

    monkeypatch.setattr(steps_module, "check_layout_of_shards", refuse)
    model = tiny_bert()
    refused(tmp_path, "no shards", model=model)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("count", [0, -1, 2.0, float("nan"), "8", True, None], ids=repr)
@pytest.mark.parametrize("name", ["out_size", "every_steps"])
def test_counts_that_are_no_positive_integers_are_refused_at_once(name, count):
    message = rf"{name} must be an integer of at least 1, got {count!r}\."
    with pytest.raises(ValueError, match=message):
        GradientSketchCallback(**{name: count})


@pytest.mark.parametrize("count", [0, -3, 2.0, "no", None], ids=repr)
def test_a_number_of_measured_examples_below_one_is_refused_at_once(count):
    message = "measure_error must be True, False or an integer of at least 1, got "
    with pytest.raises(ValueError, match=f"{message}{count!r}"):
        GradientSketchCallback(measure_error=count)


@pytest.mark.parametrize("name", ["per_step", "per_example"])
def test_flags_that_are_no_booleans_are_refused_at_once(name):
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 'no'"):
        GradientSketchCallback(**{name: "no"})


@pytest.mark.parametrize("seed", [-1, 0.5, float("nan"), "1", False], ids=repr)
def test_seeds_that_are_no_integers_are_refused_at_once(seed):
    with pytest.raises(ValueError, match=f"seed must be an integer .*, got {seed!r}"):
        GradientSketchCallback(seed=seed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layout", "round"),
        ("operator", "jl"),
        ("loss", "median"),
        ("row_dtype", "int4"),
        ("on_error", "ignore"),
        ("on_error", None),
    ],
)
def test_unknown_choices_are_refused_at_once(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be one of .*, got {value!r}"):
        GradientSketchCallback(**{name: value})


def test_nothing_to_record_is_refused_at_once():
    with pytest.raises(ValueError, match=r"all False, .*Remove the callback\."):
        GradientSketchCallback(per_step=False, per_example=False)


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


def test_a_model_that_no_process_has_whole_is_refused(tmp_path, monkeypatch):
    class Part(torch.Tensor):
        pass

    class Sharded:
        distributed_type = DistributedType.FSDP

    model = tiny_bert()
    part = torch.randn(3, 32).as_subclass(Part)
    model.classifier.weight = torch.nn.Parameter(part)
    message = r"Callback does not support {}\. Train without, or remove the callback\."
    refused(tmp_path, message.format("parameters in parts"), model=model)
    monkeypatch.setattr(processes_module, "AcceleratorState", Sharded)
    refused(tmp_path, message.format("FSDP of version 1"))


def test_several_gpus_in_one_process_are_refused_with_what_to_do(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"accelerate launch`, or set CUDA_VISIBLE"):
        processes_module.check_processes(
            trainer.args, trainer.model, "GradientSketchCallback"
        )


def test_a_model_on_several_devices_is_refused(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.model.classifier.to("meta")
    with pytest.raises(ValueError, match="not support parameters on several devices"):
        processes_module.check_processes(
            trainer.args, trainer.model, "GradientSketchCallback"
        )


def test_processes_that_share_examples_are_refused(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path)
    config = ParallelismConfig(cp_size=2, sp_size=1)
    monkeypatch.setattr(AcceleratorState(), "parallelism_config", config)
    with pytest.raises(ValueError, match="does not support context parallelism"):
        processes_module.check_processes(
            trainer.args, trainer.model, "GradientSketchCallback"
        )


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "sketches").write_text("a file where the directory should be")
    message = "Cannot write sketches to .* Give the Trainer an output_dir"
    refused(tmp_path, message, error=OSError)


def test_a_store_of_other_settings_is_refused_and_kept(tmp_path):
    tiny_trainer(tmp_path, GradientSketchCallback(SIZE)).train()
    before = load_sketches(tmp_path).dataset[:]
    other = GradientSketchCallback(SIZE // 2)
    message = r"made with out_size=256, .* uses out_size=128.* Pass the store's"
    refused(tmp_path, message, callback=other)
    assert load_sketches(tmp_path).dataset[:] == before


def test_resuming_with_other_settings_is_refused(tmp_path):
    tiny_trainer(tmp_path, GradientSketchCallback(SIZE)).train()
    trainer = tiny_trainer(tmp_path, GradientSketchCallback(SIZE // 2))
    with pytest.raises(
        ValueError, match=r"made with out_size=256, .* this run uses out_size=128"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(load_sketches(tmp_path).dataset) == 44


def test_other_groups_of_layers_are_other_settings(tmp_path):
    tiny_trainer(tmp_path, GradientSketchCallback(SIZE, groups=2)).train()
    groups = {"head": "pooler|classifier", "rest": None}
    message = r"with groups=\['bert\..*\], out_size=256.*uses groups=\['rest', 'head'\]"
    refused(tmp_path, message, callback=GradientSketchCallback(SIZE, groups=groups))
    refused(tmp_path, r"uses out_size=256", callback=GradientSketchCallback(SIZE))
    message = "groups must be at most 8, the number of layers that train, got 9: pass"
    refused(tmp_path / "new", message, callback=GradientSketchCallback(8, groups=9))
    with pytest.raises(
        ValueError, match="groups must be an integer of at least 1, got"
    ):
        GradientSketchCallback(groups=0)
