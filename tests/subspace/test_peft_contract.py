"""What PEFT's own tests ask of a method, on models that are no transformers.

Left out is what a method without layers has no place for: features of a layer's input
and output, adapters of single layers, several that are active at once, and
`inject_adapter_in_model`, which PEFT refuses to methods that share state.
"""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from hf_sketch import SubspaceConfig
from tests.helpers.adapters import lifted
from tests.helpers.tiers import full


class Perceptron(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 2)

    def forward(self, x):
        return self.lin1(self.lin0(x.to(self.lin0.weight)).relu()).float()


class Convolution(nn.Module):
    """A convolution of embeddings, normalized, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(100, 5)
        self.conv = nn.Conv1d(5, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.lin1 = nn.Linear(4, 2)

    def forward(self, x):
        hidden = self.conv(self.emb(x).transpose(1, 2)).mean(2)
        return self.lin1(self.norm(hidden)).float()


CASES = [
    (Perceptron, {"dim": 32}),
    *full(
        (Perceptron, {"dim": 16, "operator": "srht", "target_parameters": ["weight"]}),
        (Perceptron, {"dim": 16, "target_modules": ["lin0"]}),
        (Convolution, {"dim": 32, "exclude_modules": ["emb", "norm"]}),
        (Convolution, {"dim": 32, "modules_to_save": ["lin1"], "max_dim": 64}),
        (Convolution, {"dim": 32, "base_on_disk": True}),
    ),
]
each_case = pytest.mark.parametrize(("kind", "settings"), CASES)


def new_base(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return kind().to(dtype).eval()


def new_model(kind, settings, dtype=torch.float32, **options):
    settings = {"init_weights": False, **settings}
    return get_peft_model(new_base(kind, dtype), SubspaceConfig(**settings), **options)


def inputs():
    return torch.arange(90).view(9, 10)


def train(model, steps=3):
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2
    )
    for _ in range(steps):
        output = model(inputs())
        nn.functional.cross_entropy(output, torch.arange(len(output)) % 2).backward()
        optimizer.step()
        optimizer.zero_grad()


@each_case
def test_only_the_adapter_changes_in_training(kind, settings):
    model = new_model(kind, settings)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = copy.deepcopy(model.get_base_model().state_dict())
    train(model.train())
    trained = ("subspace_", "modules_to_save")
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        own = any(part in name for part in trained)
        assert moved == own or (settings.get("base_on_disk") and not own), name
        assert parameter.requires_grad == own, name
    if not settings.get("base_on_disk"):
        for name, tensor in model.get_base_model().state_dict().items():
            assert torch.equal(tensor, state[name]) or "modules_to_save" in name


@each_case
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_adapters_are_loaded(kind, settings, low_cpu_mem_usage, tmp_path):
    model = new_model(kind, settings)
    train(model)
    expected = model.eval()(inputs())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        new_base(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(loaded(inputs()), expected)
    states = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[1][name], t) for name, t in states[0].items())
    assert not any(p.is_meta for p in loaded.parameters())
    config = SubspaceConfig.from_pretrained(tmp_path)
    assert config == model.peft_config["default"] or config.inference_mode
    assert config.peft_type.value == "SUBSPACE"


@each_case
def test_merging_is_undone_and_not_done_twice(kind, settings):
    model, plain = new_model(kind, settings), new_base(kind)
    outputs, base_outputs = model(inputs()), plain(inputs())
    assert not torch.allclose(outputs, base_outputs)
    theta0 = {n: p.detach().clone() for n, p in plain.named_parameters()}
    for _ in range(2):
        model.merge_adapter()
        assert torch.equal(model(inputs()), outputs)
        with pytest.warns(UserWarning, match="already merged, nothing to do"):
            model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(model(inputs()), outputs)
        with pytest.warns(UserWarning, match="no adapter is merged, nothing to do"):
            model.unmerge_adapter()
    model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match=r"Cannot delete adapter.*Please unmerge"):
        model.delete_adapter("default")
    with model.disable_adapter():
        assert torch.equal(model(inputs()), base_outputs)
        found = dict(model.get_base_model().named_parameters())
        for name, parameter in theta0.items():
            if name in found:
                assert torch.equal(found[name], parameter)
    assert torch.equal(model(inputs()), outputs)
    merged = model.merge_and_unload()
    assert type(merged) is kind
    assert torch.equal(merged(inputs()), outputs)


@each_case
def test_a_merged_adapter_that_is_unloaded_leaves_the_base(kind, settings):
    model, plain = new_model(kind, settings), new_base(kind)
    model.merge_adapter()
    unloaded = model.unload()
    for name, parameter in plain.named_parameters():
        assert torch.equal(unloaded.get_parameter(name), parameter)


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, *full(torch.float32, torch.float16)])
@pytest.mark.parametrize("autocast", [True, False])
def test_an_adapter_has_float32_or_the_dtype_of_its_base(
    kind, settings, dtype, autocast, tmp_path
):
    model = new_model(kind, settings, dtype, autocast_adapter_dtype=autocast)
    config = SubspaceConfig(init_weights=False, **settings)
    model.add_adapter("other", config, autocast_adapter_dtype=autocast)
    expected = torch.float32 if autocast else dtype
    omegas = [p for name, p in model.named_parameters() if "subspace_" in name]
    assert [omega.dtype for omega in omegas] == [expected] * 2
    model(inputs()).sum().backward()
    assert omegas[0].grad.isfinite().all()
    assert omegas[0].grad.any()
    # What is lifted is rounded once, as theta.
    lift = lifted(model.base_model, torch.float32)
    merged = model.merge_and_unload()
    for name, parameter in new_base(kind, dtype).named_parameters():
        if name in lift:
            theta = (parameter.float() + lift[name]).to(dtype)
            assert torch.equal(merged.get_parameter(name), theta)


@each_case
def test_adapters_are_added_switched_and_deleted(kind, settings):
    model = new_model(kind, settings)
    first = model(inputs())
    model.add_adapter("other", SubspaceConfig(**{**settings, "seed": 5}))
    assert torch.equal(model(inputs()), first)
    model.set_adapter("other")
    assert model.active_adapters == ["other"]
    assert model.base_model.omega.requires_grad
    second = model(inputs())
    assert not torch.allclose(second, first)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="set_adapter unmerges the adapters"):
        model.set_adapter("default")
    assert torch.equal(model(inputs()), first)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="add_adapter unmerges the adapters"):
        model.add_adapter("third", SubspaceConfig(**settings))
    assert torch.equal(model(inputs()), first)
    model.delete_adapter("third")
    with pytest.warns(UserWarning, match="default was active which is now deleted"):
        model.delete_adapter("default")
    assert torch.equal(model(inputs()), second)
    assert not [n for n, _ in model.named_parameters() if n.endswith("default")]


@pytest.mark.parametrize(
    ("settings", "moving"),
    [
        ({"target_modules": ["lin0"]}, {"lin0.weight", "lin0.bias"}),
        ({"target_modules": r"lin\d"}, None),
        (
            {"target_modules": ["lin0", "lin1"], "target_parameters": ["weight"]},
            {"lin0.weight", "lin1.weight"},
        ),
        ({"exclude_modules": ["lin0"]}, {"lin1.weight", "lin1.bias"}),
        ({"exclude_modules": "lin1", "exclude_parameters": ["bias"]}, {"lin0.weight"}),
        ({"target_modules": DUMMY_TARGET_MODULES}, None),
    ],
)
def test_modules_are_chosen_by_name(settings, moving):
    model = new_model(Perceptron, {"dim": 8, **settings})
    theta0, outputs = new_base(Perceptron), model(inputs())
    merged = model.merge_and_unload()
    changed = {
        name
        for name, parameter in merged.named_parameters()
        if not torch.equal(parameter, theta0.get_parameter(name))
    }
    everything = {name for name, _ in theta0.named_parameters()}
    assert changed == (everything if moving is None else moving)
    assert torch.equal(merged(inputs()), outputs)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target_modules": ["nothing"]}, "needs parameters, got none"),
        ({"target_modules": "all-linear"}, "must be names of modules or a regular"),
        ({"init_weights": "no"}, "init_weights must be True or False, got 'no'"),
    ],
)
def test_bad_choices_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        get_peft_model(Perceptron(), SubspaceConfig(dim=8, **settings))
