"""Parameters in shards (FSDP2) give the rows that whole ones give."""

import json
import math
from dataclasses import fields
from importlib.util import find_spec

import pytest
import torch

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.processes.failing_trials import adapted
from tests.helpers.processes.joint_trainers import SIZE, even
from tests.helpers.processes.launching import launch, results, run_together
from tests.helpers.processes.loaded_training import TRAINING as LOADED
from tests.helpers.processes.loaded_training import even_dataset
from tests.helpers.processes.sharded_models import IN_MANY_UNITS
from tests.helpers.processes.sharded_training import GREATEST
from tests.helpers.rows import assert_same_rows, columns, in_order
from tests.helpers.trained.text_training import Pad, undropped
from tests.helpers.trained.text_training import train as trained
from tests.helpers.trained.tiny_models import NAMES
from tests.helpers.trained.training import tiny_dataset, tiny_trainer

pytestmark = pytest.mark.xdist_group("processes")
UNITS = ("sharded", "with_a_tail")


def single(directory, model=None, **options):
    """The store of the same training in one process, with whole parameters."""
    settings = even() if model is None else {**even(), "model": model}
    dataset = tiny_dataset(settings.pop("rows"))
    callback = GradientSketchCallback(SIZE, **options)
    tiny_trainer(directory, callback, dataset=dataset, **settings).train()
    return load_sketches(directory)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return single(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param("watched", marks=pytest.mark.in_processes(2, "fsdp/watched")),
        pytest.param(
            "checkpointed",
            marks=[pytest.mark.in_processes(2, "fsdp/checkpointed"), pytest.mark.full],
        ),
        pytest.param(
            "replicas",
            marks=[pytest.mark.in_processes(4, "fsdp/replicas"), pytest.mark.full],
        ),
    ],
)
def test_rows_are_those_of_whole_parameters(launched, scenario, whole):
    store = load_sketches(launched / scenario)
    assert_same_rows(store, whole)
    assert store.measured_error is None
    header = json.loads((launched / scenario / "sketches/header.json").read_text())
    assert header["unverified"] is None


@pytest.mark.full
@pytest.mark.in_processes(4, "fsdp/watched")
def test_shards_that_are_empty_on_some_processes(launched, whole):
    """Three classes in four processes."""
    assert_same_rows(load_sketches(launched / "watched"), whole)


@pytest.mark.in_processes(2, "fsdp/blocked")
def test_rows_of_steps_in_blocks(launched, tmp_path):
    options = {"layout": "blocked", "per_example": False}
    got = columns(load_sketches(launched / "blocked").steps)
    wanted = columns(single(tmp_path, **options).steps)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.full
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.in_processes(2, "fsdp/at_once")
def test_kernels_sketch_all_shards_at_once(launched, whole):
    """And exchange, once per step, a sketch with three norms."""
    got, wanted = (
        columns(store.steps) for store in (load_sketches(launched / "at_once"), whole)
    )
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-6)
    for sizes in results(launched / "at_once", "exchanged"):
        assert sizes == [SIZE + 3] * 6


@pytest.mark.in_processes(2, "fsdp/layers")
def test_rows_of_groups_of_layers(launched, tmp_path):
    store = load_sketches(launched / "layers")
    assert len(store.model_sketch.layer_groups.columns) == 3
    assert_same_rows(store, single(tmp_path, groups=3))


@pytest.mark.full
@pytest.mark.in_processes(2, "fsdp/mixed")
def test_rows_in_bfloat16(launched, whole):
    got, wanted = load_sketches(launched / "mixed"), whole
    for kind in ("steps", "dataset"):
        rows = [columns(getattr(store, kind)) for store in (got, wanted)]
        rows = [in_order(r) if kind == "dataset" else r for r in rows]
        distance = (rows[0]["sketch"] - rows[1]["sketch"]).norm()
        assert 0 < distance < 0.03 * rows[1]["sketch"].norm()


@pytest.mark.full
@pytest.mark.in_processes(2, "fsdp/families")
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_examples_of_every_family(launched, name):
    assert all(distance < 1e-9 for distance in results(launched / "families", name))


@pytest.mark.full
@pytest.mark.in_processes(2, "fsdp/units")
@pytest.mark.parametrize("name", IN_MANY_UNITS)
def test_modules_that_are_units_of_their_own(launched, name):
    assert all(distance < 1e-9 for distance in results(launched / "units", name))


@pytest.mark.in_processes(2, "fsdp/watched")
def test_a_sketch_and_some_norms_alone_are_exchanged(launched):
    """Of the first step also the sum of its rows; each step has three norms."""
    for sizes in results(launched / "watched", "exchanged"):
        assert sorted(sizes) == [1] * 18 + [SIZE] * 7


@pytest.mark.full
@pytest.mark.in_processes(2, "fsdp/memory")
@pytest.mark.parametrize("layout", ["grouped", "blocked"])
def test_the_row_of_a_step_needs_less_memory_than_a_shard(launched, layout):
    """Of the greatest parameter, in the first step too, which draws what is random."""
    shard_bytes = math.prod(GREATEST) * 4 / 2
    for peaks in results(launched / "memory", layout):
        assert len(peaks) == 3
        assert 0 < max(peaks) < shard_bytes


@pytest.mark.in_processes(2, "fsdp/dropped", "fsdp/plain")
def test_nothing_is_gathered_for_rows(launched):
    """Beside training's own exchanges there are those sums, barriers and settings.

    Before the first rows, modules are tried on a few examples.
    """
    pairs = zip(
        *(results(launched / x, "collectives") for x in ("dropped", "plain")),
        strict=True,
    )
    for got, plain in pairs:
        assert got.pop("c10d::allreduce_") == 25
        got.pop("c10d::barrier")  # for files
        # The settings before training, of what kind the first batches are, and
        # whether they could be tried.
        got["c10d::allgather_"] -= 16
        got.pop("c10d::broadcast_")  # examples that all try, and what came of it
        plain.pop("c10d::broadcast_")
        of_units = "c10d::_allgather_base_"
        a_pass = plain[of_units] / 12  # steps of two batches
        assert 0 < got.pop(of_units) - plain.pop(of_units) <= 6 * a_pass
        assert got == plain


@pytest.mark.in_processes(2, "fsdp/dropped", "fsdp/plain")
def test_training_is_bit_equal_with_and_without(launched):
    assert results(launched / "plain", "curve") == results(
        launched / "dropped", "curve"
    )
    for rank in (0, 1):
        plain, watched = (
            torch.load(launched / name / f"weights-{rank}.pt")
            for name in ("plain", "dropped")
        )
        assert all(torch.equal(plain[name], watched[name]) for name in plain)


@pytest.mark.full
@pytest.mark.in_processes(2, "fsdp/watched", "fsdp/resumed")
def test_resumed_rows_are_those_of_training_that_went_through(launched):
    """The last two steps; the weights come out of FSDP2's own checkpoint."""
    got, wanted = (load_sketches(launched / name) for name in ("resumed", "watched"))
    steps = columns(got.steps)
    assert steps["step"].tolist() == [5, 6]
    torch.testing.assert_close(steps["sketch"], columns(wanted.steps)["sketch"][4:])


@pytest.mark.in_processes(2, "fsdp/refused")
def test_what_needs_whole_parameters_is_refused(launched):
    for text in results(launched / "refused", "flat"):
        assert "layout='flat' needs the whole gradient in one place" in text
    for name, user in (("curvature", "curvature"), ("subspace", "a subspace")):
        for text in results(launched / "refused", name):
            assert f"{user} needs whole parameters, got them in shards" in text
    for text in results(launched / "refused", "exchanged"):
        assert "the model must keep the parameters that it had" in text
    for texts in results(launched / "refused", "spectrum"):
        expected = "HessianSpectrumCallback does not support FSDP"
        assert any(expected in text for text in texts)
    assert not (launched / "refused" / "curvature").exists()


@pytest.mark.in_processes(2, "trial/alone")
def test_all_processes_end_if_one_fails_as_rules_are_tried(launched):
    for text in results(launched / "alone", "error"):
        assert "in one of the processes: ValueError: a part is odd. Pass meas" in text


@pytest.mark.full
@pytest.mark.in_processes(2, "trial/adapters")
def test_rules_are_tried_again_when_gradients_are_zero_no_longer(launched, tmp_path):
    store = load_sketches(launched / "adapters")
    assert_same_rows(store, single(tmp_path, adapted()))
    header = json.loads((launched / "adapters/sketches/header.json").read_text())
    assert header["unverified"] is None


@pytest.mark.full
def test_a_process_that_runs_out_of_memory_as_rules_are_tried_ends_the_others(tmp_path):
    code, errors, seconds = run_together(2, tmp_path, ["trial/exhausted"])
    assert code == 1
    assert "in one of the processes: out of memory (the device is full)" in errors
    assert seconds < 300  # the others would wait for half an hour


@pytest.mark.in_processes(2, "fsdp/fused")
def test_losses_of_an_unknown_form_are_found_out_together(launched):
    """A row is the gradient of its example's own loss, and not of its share."""
    shards = [f"{shard} {tied}" for shard in UNITS for tied in (False, True)]
    for name in [*shards, "rows", *(["unit"] if find_spec("trl") else [])]:
        assert max(results(launched / "fused", name)) < 1e-6
    assert max(results(launched / "fused", "autocast")) < 0.02


@pytest.mark.full
@pytest.mark.in_processes(2, "fsdp/families")
def test_sketch_dataset_refuses_models_in_shards(launched):
    for text in results(launched / "families", "dataset"):
        assert "sketch_dataset needs whole parameters, got them in shards" in text


@pytest.mark.full
def test_models_that_are_distributed_as_they_are_loaded(tmp_path):
    distributed = pytest.importorskip("transformers.distributed")
    known = {field.name for field in fields(distributed.DistributedConfig)}
    if not {"tp_size", "pp_size", "fsdp_size"} <= known:
        pytest.skip("this transformers loads no model into several processes")
    scenarios = ("shards", "tensor", "pipeline")
    launch(2, tmp_path, scenarios, module="tests.helpers.processes.loaded_training")
    model, callback = undropped("llama"), GradientSketchCallback(SIZE)
    directory = tmp_path / "single"
    expected = trained(directory, model, even_dataset(), Pad(), [callback], **LOADED)
    assert_same_rows(load_sketches(tmp_path / "shards"), expected)
    for way in ("tensor", "pipeline"):
        for error in results(tmp_path / way, "error"):
            assert "GradientSketchCallback does not support" in error
            assert f"{way} parallelism. Train without" in error
