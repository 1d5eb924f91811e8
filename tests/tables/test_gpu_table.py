import json
import logging
import time

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_sketch.recipes.tables.gpu import fused_head
from hf_sketch.recipes.tables.gpu.__main__ import GpuArguments, run_gpu
from hf_sketch.recipes.tables.gpu.limits import Section
from hf_sketch.recipes.tables.gpu.sections import Settings, sections_of


def run(directory, *sections):
    arguments = GpuArguments(str(directory), ",".join(sections), rounds=1, tiny=True)
    run_gpu(arguments)
    return json.loads((directory / "gpu.json").read_text())["results"]


def test_sections_of_several_runs_are_joined(tmp_path):
    run(tmp_path, "ceilings")
    saved = run(tmp_path, "agreement", "layouts")
    assert saved["ceilings"]["results"]["copy_bytes_per_second"] > 0
    distances = saved["agreement"]["results"].values()
    assert max(max(pair.values()) for pair in distances) < 1e-5
    layouts = saved["layouts"]["results"]
    operators = {f"grouped {operator}" for operator in ("affd", "afjl", "fjl")}
    assert layouts.keys() == {"blocked", "factored", "flat", "grouped"} | operators
    assert max(max(pair.values()) for pair in layouts.values()) < 1e-5


def test_times_stand_beside_their_floors(tmp_path):
    saved = run(tmp_path, "ceilings", "step", "scoring")
    rates = saved["ceilings"]["results"]
    for name in ("step", "scoring"):
        for figures in saved[name]["results"].values():
            expected = figures["median_seconds"] / figures["floor_seconds"]
            assert figures["ratio_to_floor"] == pytest.approx(expected)
    # 4096 rows of 64 numbers: their products with 100 queries take longer than a read.
    flops = 2 * 4096 * 64 * 100
    floor = saved["scoring"]["results"]["int8, 100 queries"]["floor_seconds"]
    read = 4096 * 64 / rates["copy_bytes_per_second"]
    assert floor == pytest.approx(max(read, flops / rates["float32_flops_per_second"]))


@pytest.mark.parametrize("items", [None, 7])
def test_a_fused_head_gives_the_loss_and_the_gradients_of_the_model(items, monkeypatch):
    """A few tokens at a time, some of which have no label."""
    monkeypatch.setattr(fused_head, "_LOGITS_AT_ONCE", 3 * 60 * 2)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 60}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    ids = torch.randint(60, (3, 8))
    batch = {"input_ids": ids, "labels": ids.where(ids > 9, -100)}
    batch |= {} if items is None else {"num_items_in_batch": items}
    found = []
    for fused in (False, True):
        if fused:
            fused_head.leave_out_logits(model)
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        found.append((output.loss.detach(), [p.grad for p in model.parameters()]))
    assert "logits" not in output
    torch.testing.assert_close(*found)


without_losses = pytest.mark.filterwarnings("ignore:.* so the loss column is NaN")


@without_losses
def test_rows_are_recorded_of_a_fused_head(tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_sketch.examples")
    assert "grouped" in run(tmp_path, "fused_head")["fused_head"]["results"]
    assert not caplog.messages  # no module is read in another way


@without_losses
@pytest.mark.full
def test_all_sections_run(tmp_path):
    """All but those that run the tests."""
    names = [name for name in sections_of(Settings("", 1, True, {})) if name != "tests"]
    saved = run(tmp_path, *names)
    assert [name for name in names if "results" not in saved[name]] == []


def test_all_sections_take_eight_minutes_at_most():
    sections = sections_of(Settings("", 1, True, {}))
    assert sum(section.seconds for section in sections.values()) <= 480


def test_a_section_that_takes_too_long_is_stopped():
    start = time.perf_counter()
    ended = Section(60, lambda: time.sleep(60)).run(left=0.05)
    assert time.perf_counter() - start < 10
    assert ended["stopped"] == "after 0 s"
    assert "results" not in ended


def test_a_section_that_fails_says_so_and_the_next_one_runs():
    def fail():
        raise RuntimeError("out of memory")

    assert Section(1, fail).run(1)["failed"] == "RuntimeError: out of memory"
    assert Section(1, lambda: 3).run(1)["results"] == 3


def test_an_unknown_section_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"sections must be among .*\['neither'\]"):
        run_gpu(GpuArguments(str(tmp_path), "neither"))
