"""What PEFT offers for adapters, on the subspace adapter."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from hf_sketch import ModelSketch, SubspaceConfig
from hf_sketch.subspace.weights import MovedWeights
from tests.helpers.adapters import adapted, moved_copy
from tests.helpers.trained.tiny_models import tiny_inputs, tiny_model


def test_saved_adapters_load_bit_for_bit_in_another_process(tmp_path):
    base, batch = tiny_model("gpt2", torch.float32), tiny_inputs("gpt2")
    base.save_pretrained(tmp_path / "base")
    model, _ = adapted(base, 2**10)
    with torch.no_grad():
        logits = model(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    torch.save((batch, logits), tmp_path / "expected.pt")
    program = (
        "import sys, torch\n"
        "from hf_sketch import SubspaceConfig\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/base')\n"
        "batch, expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "model = PeftModel.from_pretrained(base, sys.argv[1] + '/adapter').eval()\n"
        "assert torch.equal(model(**batch).logits, expected)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_an_adapter_file_holds_omega_alone(tmp_path):
    model, _ = adapted(tiny_model("gpt2", torch.float32), 2**12, max_dim=2**12)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 4 * 2**12 <= size < 4 * 2**12 + 200


def test_disabled_merged_and_unloaded_adapters_are_exact():
    base, batch = tiny_model("gpt2", torch.float32), tiny_inputs("gpt2")
    plain = copy.deepcopy(base)
    model, tuner = adapted(base)
    with torch.no_grad():
        theirs, ours = plain(**batch).logits, model(**batch).logits
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, theirs)
        assert torch.equal(model(**batch).logits, ours)
        model.merge_adapter()
        assert torch.equal(model(**batch).logits, ours)
        before = tuner.omega.clone()
        tuner.omega.add_(1)
        assert torch.equal(model(**batch).logits, ours)
        tuner.omega.copy_(before)
        model.unmerge_adapter()
        merged = model.merge_and_unload()
        assert torch.equal(merged(**batch).logits, ours)
    assert type(merged) is type(plain)
    assert not torch.equal(ours, theirs)


def test_theta0_on_disk_gives_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    base, batch = tiny_model("gpt2", torch.float32), tiny_inputs("gpt2")
    models = [
        adapted(copy.deepcopy(base), base_on_disk=on_disk)[0]
        for on_disk in (False, True)
    ]
    for _ in range(2):
        losses = [model(**batch).loss for model in models]
        assert torch.equal(*losses)
        with torch.no_grad():
            for model in models:
                model.base_model.omega.add_(0.01)
    assert not list(tmp_path.iterdir())
    model = models[1].unload()
    assert torch.equal(model(**batch).logits, base(**batch).logits)


def test_unloading_gives_the_base_model_back():
    base = tiny_model("gpt2", torch.float32)
    plain = {name: p.clone() for name, p in base.named_parameters()}
    model, _ = adapted(base)
    model(**tiny_inputs("gpt2"))
    unloaded = model.unload()
    assert all(torch.equal(p, plain[n]) for n, p in unloaded.named_parameters())
    assert not unloaded._forward_pre_hooks


def test_merging_checks_omega():
    model, tuner = adapted(tiny_model("gpt2", torch.float32))
    with torch.no_grad():
        tuner.omega[3] = torch.nan
    with pytest.raises(ValueError, match="must be finite, got 1 that are not"):
        model.merge_and_unload(safe_merge=True)


def test_several_adapters_share_a_base(tmp_path):
    base, batch = tiny_model("bert", torch.float32), tiny_inputs("bert")
    model, tuner = adapted(base)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        first = model(**batch).logits
        model.add_adapter("second", SubspaceConfig(dim=8, operator="srht", seed=1))
        assert torch.equal(model(**batch).logits, first)
        model.set_adapter("second")
        tuner.omega.fill_(0.01)
        second = model(**batch).logits
        model.set_adapter("default")
        assert torch.equal(model(**batch).logits, first)
        model.load_adapter(tmp_path, "third")
        model.set_adapter("third")
        assert torch.equal(model(**batch).logits, first)
        model.set_adapter("second")
        model.delete_adapter("third")
        assert torch.equal(model(**batch).logits, second)
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="one subspace adapter is active at a time"):
        tuner.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("third")


def test_generation_uses_the_newest_omega():
    base, batch = tiny_model("bart", torch.float32), tiny_inputs("bart")
    plain = copy.deepcopy(base).eval()
    model, tuner = adapted(base.eval())
    model(**batch)
    with torch.no_grad():
        tuner.omega.mul_(40)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "do_sample": False, "output_scores": True}
    settings["return_dict_in_generate"] = True
    ours = model.generate(**inputs, **settings).scores[0]
    theirs = moved_copy(plain, tuner).generate(**inputs, **settings).scores[0]
    torch.testing.assert_close(ours, theirs)


def test_frozen_and_excluded_parameters_stay(tmp_path):
    base = tiny_model("gpt2", torch.float32)
    plain = copy.deepcopy(base)
    base.transformer.wpe.weight.requires_grad_(False)
    settings = {"exclude_parameters": ["ln_f.bias", "ln_f.weight"]}
    model, tuner = adapted(base, **settings)
    covered = tuner.model_sketch.coverage().parameters
    left_out = {"transformer.wpe.weight", "transformer.ln_f.weight"}
    assert left_out.isdisjoint(covered)
    assert model.peft_config["default"].exclude_parameters[-1] in left_out
    batch = tiny_inputs("gpt2")
    logits = model.eval()(**batch).logits
    assert torch.equal(base.transformer.wpe.weight, plain.transformer.wpe.weight)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.equal(again(**batch).logits, logits)


def test_all_of_a_frozen_model_moves():
    model, tuner = adapted(tiny_model("gpt2", torch.float32))
    merged = model.merge_and_unload()
    assert not any(p.requires_grad for p in merged.parameters())
    _, again = adapted(merged)
    assert again.model_sketch.shapes == tuner.model_sketch.shapes


def test_names_of_omega_end_as_those_of_lora_do(tmp_path):
    """TRL copies an adapter by names with `.default.` in them."""
    model, tuner = adapted(tiny_model("gpt2", torch.float32))
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            reference = model.get_parameter(name.replace(".default.", ".ref."))
            reference.data.copy_(parameter.data)
    assert torch.equal(tuner.coordinates.of("ref").weight, tuner.omega)


def test_adapters_that_were_saved_under_an_older_name_load(tmp_path):
    model, tuner = adapted(tiny_model("gpt2", torch.float32))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    ((name, omega),) = load_file(path).items()
    save_file({name.removesuffix(".weight"): omega}, path)
    again = PeftModel.from_pretrained(tiny_model("gpt2", torch.float32), tmp_path)
    assert torch.equal(again.base_model.omega, tuner.omega)


def test_only_the_named_parameters_move():
    _, tuner = adapted(
        tiny_model("gpt2", torch.float32), target_parameters=["c_attn.weight"]
    )
    covered = tuner.model_sketch.coverage().parameters
    assert covered == tuple(f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1))
    _, tuner = adapted(
        tiny_model("gpt2", torch.float32), target_parameters=r".*\.h\.1\..*bias"
    )
    assert all(
        ".h.1." in name and name.endswith("bias")
        for name in tuner.model_sketch.coverage().parameters
    )


def test_modules_to_save_are_trained_in_full(tmp_path):
    base, batch = tiny_model("bert", torch.float32), tiny_inputs("bert")
    plain = copy.deepcopy(base)
    model, tuner = adapted(base, task_type="SEQ_CLS")
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    kinds = {name.split(".")[-3] for name in names}
    assert kinds == {"modules_to_save", "subspace_omega"}
    assert not any("classifier" in n for n, _ in tuner.model_sketch.shapes)
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("on_disk", [False, True])
def test_moving_the_model_moves_theta0(on_disk):
    base, batch = tiny_model("gpt2", torch.float32), tiny_inputs("gpt2")
    plain = copy.deepcopy(base).double()
    model, _ = adapted(base, base_on_disk=on_disk)
    model(**batch)
    model.double()
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_stands_beside_the_parameters_follows_them(on_disk):
    """theta in memory, theta0 on disk."""
    theta0 = torch.arange(6.0).view(2, 3)
    parameter = torch.nn.Parameter(theta0.clone())
    sketch = ModelSketch((("w", (2, 3)),), 2)
    weights, seen = MovedWeights(on_disk), []
    weights.move({"w": parameter}, sketch, torch.ones(2))
    theta = theta0 + sketch.adjoint(torch.ones(2))["w"]
    assert torch.equal(weights.at("w", parameter), theta)
    assert torch.equal(parameter, theta if on_disk else theta0)
    weights.apply(torch.Tensor.double)
    weights.apply(lambda tensor: seen.append(tensor) or tensor)
    assert torch.equal(seen[0], (theta0 if on_disk else theta).double())


def test_another_base_model_is_refused(tmp_path):
    model, _ = adapted(tiny_model("gpt2", torch.float32))
    model.save_pretrained(tmp_path)
    other = tiny_model("gpt2", torch.float32)
    with torch.no_grad():
        other.transformer.wte.weight[0, 0] += 1
    match = r"must have the fingerprint \w{32}.*base_fingerprint=None"
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(other, tmp_path)
    config = SubspaceConfig.from_pretrained(tmp_path)
    config.base_fingerprint = None
    PeftModel.from_pretrained(other, tmp_path, config=config)
