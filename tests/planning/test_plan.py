import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

from hf_sketch import ModelSketch
from hf_sketch.planning.batch import BatchShape, batch_cost
from hf_sketch.planning.limits import limits_of
from hf_sketch.planning.plan import plan_recording
from hf_sketch.planning.rate import measured_rate
from hf_sketch.planning.settings import RowSettings, SpectrumSettings, TrainingRun
from hf_sketch.planning.units import as_bytes, as_seconds
from hf_sketch.recipes.meta_models import load_config, meta_model
from hf_sketch.recipes.plan import PlanArguments, run_plan

SMALL = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 300}
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "architectures": ["LlamaForCausalLM"],
}
RUN = TrainingRun(examples=1000, batch_size=4, tokens=32)


@pytest.fixture
def small():
    return meta_model(GPT2Config(**SMALL), torch.float32)


def test_numbers_are_those_of_both_sides_or_of_each_examples_gradient():
    model = nn.Sequential(nn.Embedding(50, 1024), nn.Linear(1024, 2048))
    batch = BatchShape(examples=2, tokens=10, element_bytes=4)
    grouped, factored, blocked = (
        batch_cost(model, ModelSketch.from_model(model, 64, layout), batch)
        for layout in ("grouped", "factored", "blocked")
    )
    linear, bias = 20 * (1024 + 2048), 20 * 2048
    assert grouped.numbers == factored.numbers == 20 * 1024 + linear + bias
    assert blocked.numbers == 2 * 50 * 1024 + 2 * 1024 * 2048 + bias
    assert blocked.held_bytes == 4 * 2 * 64  # the rows
    assert factored.held_bytes - blocked.held_bytes == 4 * 50 * 8  # factors of its ids
    folding = 4 * 20 * 4 * 64  # the second side three times, the first one rotated
    assert grouped.held_bytes - blocked.held_bytes == 4 * 50 + folding  # signs of ids


def test_a_frozen_layer_costs_nothing():
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512))
    batch = BatchShape(examples=2, tokens=10, element_bytes=4)
    both = batch_cost(model, ModelSketch.from_model(model, 64, "grouped"), batch)
    model[0].requires_grad_(False)
    one = batch_cost(model, ModelSketch.from_model(model, 64, "grouped"), batch)
    assert both.numbers - one.numbers == 20 * 1024


def test_both_uses_of_a_tied_table_are_counted(small):
    plan = plan_recording(small, RUN)
    config = GPT2Config(**SMALL, tie_word_embeddings=False)
    apart = plan_recording(meta_model(config, torch.float32), RUN)
    assert apart.elements - plan.elements == 300 * 64
    assert apart.step_numbers - plan.step_numbers == 300 * 64  # of the step's row


def test_a_plan_of_shapes_alone_is_that_of_the_model_itself(small):
    assert all(parameter.is_meta for parameter in small.parameters())
    assert plan_recording(small, RUN) == plan_recording(
        GPT2LMHeadModel(GPT2Config(**SMALL)), RUN
    )


def test_rows_of_fewer_steps_cost_as_much_less(small):
    every, fourth = (
        plan_recording(
            small,
            RUN,
            RowSettings(every_steps=n),
            numbers_per_second=1e9,
            plain_step_seconds=0.5,
        )
        for n in (1, 4)
    )
    assert (every.steps, fourth.steps) == (250, 62)
    assert fourth.store.rows == 62 * 4
    assert every.step_seconds == fourth.step_seconds == every.step_numbers / 1e9
    assert every.slowdown == 1 + every.step_seconds / 0.5
    assert every.slowdown - 1 == pytest.approx(4 * (fourth.slowdown - 1))


def test_without_a_rate_no_seconds_are_estimated(small):
    plan = plan_recording(small, RUN, plain_step_seconds=0.5)
    assert plan.step_seconds is None
    assert plan.slowdown is None


def test_the_blocked_layout_reads_more_and_holds_less(small):
    grouped, blocked = (
        plan_recording(small, RUN, RowSettings(layout=layout))
        for layout in ("grouped", "blocked")
    )
    assert blocked.step_numbers > grouped.step_numbers
    assert blocked.held_bytes < grouped.held_bytes


def test_a_steps_row_reads_each_gradient_once_split_over_shards(small):
    def numbers(per_step, **options):
        run = TrainingRun(1000, batch_size=4, tokens=32, **options)
        return plan_recording(small, run, RowSettings(per_step=per_step)).step_numbers

    size = sum(parameter.numel() for parameter in small.parameters())
    assert numbers(True) - numbers(False) == size
    shards = {"ranks": 4, "sharded": True}
    assert numbers(True, **shards) - numbers(False, **shards) == size // 4
    assert numbers(False, accumulation=3) == 3 * numbers(False)


def test_models_of_16_bits_need_a_float32_copy_of_their_widest_gradient():
    held = [
        plan_recording(meta_model(GPT2Config(**SMALL), dtype), RUN).held_bytes
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert held[0] - held[1] == 4 * 32 * 300 * 4  # of the logits


def test_a_sketch_alone_goes_over_the_network_in_shards(small):
    def bytes_of(**options):
        run = TrainingRun(1000, batch_size=4, tokens=32, **options)
        return plan_recording(small, run).recording_network_bytes

    assert bytes_of() == bytes_of(ranks=4) == 0
    assert bytes_of(ranks=4, sharded=True) == 4 * 4096


def test_a_spectrum_takes_its_basis_and_its_products(small):
    spectrum = SpectrumSettings(out_size=2**12, krylov_dim=30)
    cost = plan_recording(small, RUN, spectrum=spectrum).spectrum
    assert cost.basis_bytes == 30 * 2**12 * 4
    assert cost.products == 34  # with those of the check on first use


def test_convolutions_are_reported_as_left_out():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 128))
    plan = plan_recording(model, RUN, RowSettings(out_size=16))
    assert plan.uncounted == ("0",)
    assert any("leave out 1 modules: 0" in s for s in limits_of(plan, RUN, 8e10, 4))


def test_seventy_billion_parameters_are_planned_and_what_breaks_is_named():
    model = meta_model(LlamaConfig(**LLAMA_70B), torch.bfloat16)
    run = TrainingRun(10**9, batch_size=4, tokens=4096, ranks=1024)
    plan = plan_recording(model, run)
    assert plan.elements == sum(p.numel() for p in model.parameters()) > 70e9
    assert plan.store.rows >= 10**9
    limits = " ".join(limits_of(plan, run, 8e10, 2))
    assert "training itself needs 8.47e+11 bytes" in limits
    assert "float32 parameters" in limits
    assert plan.store.files < 20_000
    files = replace(plan, store=replace(plan.store, files=70_000))
    assert "the store has 70,000 files" in " ".join(limits_of(files, run, 8e10, 2))
    shards = TrainingRun(10**9, batch_size=4, tokens=4096, ranks=1024, sharded=True)
    plan = plan_recording(model, shards)
    shown = " ".join(limits_of(plan, shards, 8e10, 2))
    assert "HessianSpectrumCallback refuses" in shown
    assert "training itself" not in shown
    assert plan.first_step_bytes == 0


@pytest.mark.parametrize("name", ["examples", "ranks", "tokens"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(
        ValueError, match=f"{name} must be an integer of at least 1, got 0"
    ):
        TrainingRun(**{"examples": 1, name: 0})


def test_unknown_settings_are_refused(small):
    with pytest.raises(ValueError, match="row_dtype must be one of"):
        RowSettings(row_dtype="int4")
    with pytest.raises(
        ValueError, match="every_steps must be an integer of at least 1, got 0"
    ):
        RowSettings(every_steps=0)
    with pytest.raises(ValueError, match="layout must be one of"):
        plan_recording(small, RUN, RowSettings(layout="square"))


def test_the_rate_of_this_machine_is_that_of_a_run():
    rate = measured_rate(RowSettings(out_size=64))
    assert 1e5 < rate < 1e14


def test_the_command_prints_a_table_and_saves_it(tmp_path, capsys):
    GPT2Config(**SMALL, architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path)
    arguments = PlanArguments(
        str(tmp_path / "config.json"),
        examples=1000,
        tokens=32,
        dtype="float32",
        out_size=256,
        numbers_per_second=1e9,
        plain_step_seconds=2.0,
        save_steps=10,
        output_file=str(tmp_path / "plan.json"),
    )
    plan = run_plan(arguments)
    printed = capsys.readouterr().out
    assert "bytes per row                      1,072" in printed
    assert "times a plain one" in printed
    assert "where it breaks:" not in printed
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["plan"]["elements"] == plan.elements
    assert saved["arguments"]["out_size"] == 256
    assert saved["plan"]["step_seconds"] == plan.step_numbers / 1e9


def test_the_class_is_that_of_the_config(tmp_path):
    config = GPT2Config(**SMALL, architectures=["GPT2ForSequenceClassification"])
    config.save_pretrained(tmp_path)
    model = meta_model(load_config(str(tmp_path)), torch.float16)
    assert type(model).__name__ == "GPT2ForSequenceClassification"
    assert next(model.parameters()).dtype == torch.float16
    assert isinstance(meta_model(GPT2Config(**SMALL), torch.float32), GPT2LMHeadModel)


def test_a_named_file_is_the_one_that_is_read(tmp_path):
    GPT2Config(**SMALL).save_pretrained(tmp_path)
    larger = tmp_path / "larger.json"
    larger.write_text(json.dumps({**GPT2Config(**SMALL).to_dict(), "n_layer": 7}))
    assert load_config(str(larger)).n_layer == 7
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must have a model_type that .* got None"):
        load_config(str(tmp_path / "other.json"))


@pytest.mark.parametrize(
    ("count", "shown"),
    [(999, "999 B"), (16432.125, "16.43 kB"), (1.6438e13, "16.44 TB")],
)
def test_sizes_have_the_unit_that_suits_them(count, shown):
    assert as_bytes(count) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0.0123, "12.3 ms"), (90, "90 s"), (3600, "60 minutes"), (259200, "3 days")],
)
def test_times_have_the_unit_that_suits_them(count, shown):
    assert as_seconds(count) == shown
