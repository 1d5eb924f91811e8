import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_sketch import QK, ModelSketch
from hf_sketch.recipes.tables.measure import peak_extra_bytes
from hf_sketch.sketches.by_name import OPERATORS
from tests.helpers.tiers import full
from tests.helpers.trained.training import tiny_bert

OTHERS = [name for name in OPERATORS if name not in ("srht", "qk")]


@pytest.fixture(params=["grouped", "blocked", "factored", "flat"])
def layout(request):
    return request.param


def gradients_of(model):
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


def test_a_parameter_that_is_empty_has_the_shape_that_deepspeed_notes():
    whole, split = tiny_bert(), tiny_bert()
    for parameter in split.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    sketch = ModelSketch.from_model(split, 64)
    assert sketch == ModelSketch.from_model(whole, 64)
    assert sketch.parameters_of(split).keys() == sketch.parameters_of(whole).keys()


def test_it_is_the_sum_of_its_operators_sketches(layout):
    model = tiny_bert()
    sketch = ModelSketch.from_model(model, 64, layout)
    gradients = gradients_of(model)
    own = sum(sketch.operators[n] @ gradients[n].flatten() for n in sketch.operators)
    rest = [
        gradients[n].flatten() for n, _ in sketch.shapes if n not in sketch.operators
    ]
    packed = sketch.packed_operators[""] @ torch.cat(rest)
    assert len(rest) + len(sketch.operators) == len(gradients)
    torch.testing.assert_close(sketch.sketch(gradients), own + packed)


def test_large_parameters_have_operators_of_their_own():
    shapes = (("large", (2**16,)), ("small", (2**16 - 1,)), ("tall", (2**12, 20)))
    sketch = ModelSketch(shapes, 64)
    assert list(sketch.operators) == ["large", "tall"]
    assert sketch.packed == {"small": slice(0, 2**16 - 1)}


def test_parts_add_up(layout):
    model = tiny_bert()
    sketch = ModelSketch.from_model(model, 64, layout)
    gradients = gradients_of(model)
    names = sorted(gradients)
    parts = [
        sketch.sketch({name: gradients[name] for name in some})
        for some in (names[::2], names[1::2])
    ]
    torch.testing.assert_close(sum(parts), sketch.sketch(gradients))
    assert torch.equal(sketch.sketch({}), torch.zeros(64))


@pytest.mark.parametrize("operator", ["srht", "qk", *full(*OTHERS)])
def test_shards_of_parameters_add_up(layout, operator):
    """Cut anywhere, within rows and blocks, and some shards empty."""
    shapes = (("wide", (300, 700)), ("deep", (3, 110, 220)), ("small", (70,)))
    sketch = ModelSketch(shapes, 64, layout, 0, operator)
    gradients = {n: torch.randn(shape, dtype=torch.float64) for n, shape in shapes}
    total = torch.zeros(64, dtype=torch.float64)
    for low, high in ((0.0, 0.37), (0.37, 0.37), (0.37, 1.0)):
        parts = {}
        for name, gradient in gradients.items():
            start, stop = (int(place * gradient.numel()) for place in (low, high))
            parts[name] = gradient.flatten()[start:stop], start
        total += sketch.sketch_parts(parts)
    torch.testing.assert_close(total, sketch.sketch(gradients))


@pytest.mark.parametrize("layout", ["grouped", "blocked", "factored"])
def test_a_shard_needs_no_memory_of_the_parameters_size(layout):
    """Nor of the shard's, whether it begins with a row and a block or not."""
    sketch = ModelSketch((("wide", (4096, 4096)),), 2**12, layout)
    for start in (2**23, 2**23 + 4096 * 7, 2**23 + 77):
        part = torch.randn(2**24 - start)
        sketch.sketch_parts({"wide": (part, start)})  # draws the signs
        extra = peak_extra_bytes(
            lambda part=part, start=start: sketch.sketch_parts({"wide": (part, start)})
        )
        copied = part.nbytes if layout != "blocked" and start % 4096 else 0
        assert extra <= copied + part.nbytes / 2


def test_the_check_value_needs_no_memory_of_the_models_size():
    sketch = ModelSketch((("wide", (2**20, 64)), ("small", (7,))), 64)
    sketch.check_value()  # draws the signs
    assert peak_extra_bytes(sketch.check_value) < 2**20


def test_the_adjoint_is_exact(layout):
    model = tiny_bert().double()
    sketch = ModelSketch.from_model(model, 64, layout)
    gradients, y = gradients_of(model), torch.randn(64, dtype=torch.float64)
    lifted = sketch.adjoint(y)
    assert {n: t.shape for n, t in lifted.items()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    inner = sum((lifted[name] * gradients[name]).sum() for name in gradients)
    torch.testing.assert_close(sketch.sketch(gradients) @ y, inner)


def test_matrices_are_factored_and_all_else_is_blocked():
    sketch = ModelSketch.from_model(tiny_bert(), 256, "factored")
    for name, shape in sketch.shapes:
        wide = len(shape) == 2 and min(shape) >= 16
        assert isinstance(sketch.operators.get(name), QK) == wide, name
        assert (name in sketch.packed) == (not wide), name


def test_another_process_computes_the_same_bits():
    script = (
        "import torch\n"
        "from hf_sketch import ModelSketch\n"
        "from tests.helpers.trained.training import tiny_bert\n"
        "model = tiny_bert()\n"
        "for layout in ('blocked', 'factored', 'flat'):\n"
        "    sketch = ModelSketch.from_model(model, 64, layout)\n"
        "    print(sketch.sketch(dict(model.named_parameters())).tolist())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        check=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    model = tiny_bert()
    for layout, theirs in zip(
        ("blocked", "factored", "flat"), run.stdout.splitlines(), strict=True
    ):
        sketch = ModelSketch.from_model(model, 64, layout)
        ours = sketch.sketch(dict(model.named_parameters()))
        assert theirs == str(ours.tolist())


def test_parameters_have_independent_signs(layout):
    sketch = ModelSketch((("a", (64, 64)), ("b", (64, 64))), 64, layout)
    x = torch.ones(64, 64)
    one, other = sketch.sketch({"a": x}), sketch.sketch({"b": x})
    assert abs(torch.cosine_similarity(one, other, dim=0)) < 0.6


def test_coverage_names_what_is_in_and_what_is_frozen():
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    coverage = ModelSketch.from_model(model, 64).coverage()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert coverage.parameters == tuple(trainable)
    assert coverage.elements == sum(p.numel() for p in trainable.values())
    assert len(coverage.frozen) == 5
    assert all(name.startswith("bert.embeddings.") for name in coverage.frozen)


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    sketch = ModelSketch.from_model(model, 8)
    assert sketch.shapes == (("0.weight", (10, 4)),)


def test_wrapper_prefixes_are_dropped():
    inner = nn.Linear(4, 4)
    wrapped = nn.ModuleDict({"module": inner})
    assert ModelSketch.from_model(wrapped, 4) == ModelSketch.from_model(inner, 4)


@pytest.mark.parametrize("operator", ["srht", "qk", *full(*OTHERS)])
def test_every_operator_is_exact_over_a_model(operator, layout):
    model = tiny_bert().double()
    sketch = ModelSketch.from_model(model, 64, layout, operator=operator)
    gradients, y = gradients_of(model), torch.randn(64, dtype=torch.float64)
    lifted = sketch.adjoint(y)
    inner = sum((lifted[name] * gradients[name]).sum() for name in gradients)
    torch.testing.assert_close(sketch.sketch(gradients) @ y, inner)
    again = ModelSketch.from_dict(json.loads(json.dumps(sketch.to_dict())))
    assert again == sketch


@pytest.mark.parametrize("operator", ["srht", "qk", *full(*OTHERS)])
def test_a_flat_sketch_is_one_operator_on_the_parameters_end_to_end(operator):
    model = tiny_bert().double()
    sketch = ModelSketch.from_model(model, 64, "flat", operator=operator)
    gradients = gradients_of(model)
    vector = torch.cat([g.flatten() for g in gradients.values()])
    assert sketch.operators == {}
    (packed,) = sketch.packed_operators.values()
    assert packed.shape == (64, len(vector))
    expected = packed @ vector
    torch.testing.assert_close(sketch.sketch(gradients), expected)


def test_it_survives_json_and_keeps_its_check_value(layout):
    sketch = ModelSketch.from_model(tiny_bert(), 64, layout, seed=3)
    again = ModelSketch.from_dict(json.loads(json.dumps(sketch.to_dict())))
    assert again == sketch
    assert again.check_value() == sketch.check_value()


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"out_size": 32}, {"layout": "factored"}]
)
def test_another_map_has_another_check_value(other):
    model = tiny_bert()
    settings = {"out_size": 64, "layout": "blocked", "seed": 0}
    one = ModelSketch.from_model(model, **settings)
    two = ModelSketch.from_model(model, **{**settings, **other})
    assert one != two
    assert one.check_value() != two.check_value()


def test_bad_arguments_are_named():
    model = tiny_bert()
    size = sum(p.numel() for p in model.parameters())
    for out_size in (0, -1, size + 1):
        with pytest.raises(ValueError, match=rf"\[1, {size}\].*got {out_size}: pass"):
            ModelSketch.from_model(model, out_size)
    with pytest.raises(ValueError, match=r"layout must be one of .*, got 'round'"):
        ModelSketch.from_model(model, 64, "round")
    with pytest.raises(ValueError, match=r"operator must be one of .*, got 'jl'"):
        ModelSketch.from_model(model, 64, operator="jl")
    with pytest.raises(ValueError, match=r"got none: call requires_grad_\(True\)"):
        ModelSketch.from_model(model.requires_grad_(False), 64)


def test_gradients_of_another_model_are_named():
    sketch = ModelSketch.from_model(nn.Linear(4, 4), 4)
    with pytest.raises(ValueError, match=r"'weight' with shape \(4, 4\), got \(4, 5\)"):
        sketch.sketch({"weight": torch.zeros(4, 5)})
    with pytest.raises(ValueError, match="'other' with shape None"):
        sketch.sketch({"other": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"'weight' with shape .* the model has"):
        sketch.parameters_of(nn.Linear(5, 4))


def test_one_pass_over_a_large_gradient_needs_little_memory():
    # 2**24 elements are 64 MiB; the pass may not hold a second copy of them.
    sketch = ModelSketch((("w", (2**24,)),), 256)
    gradient = {"w": torch.ones(2**24)}
    sketch.sketch({"w": gradient["w"]})
    with torch.profiler.profile(profile_memory=True) as profile:
        sketch.sketch(gradient)
    allocated = [
        event.cpu_memory_usage
        for event in profile.events()
        if event.name != "[memory]" and event.cpu_memory_usage > 0
    ]
    assert max(allocated) <= 8 * 2**20
