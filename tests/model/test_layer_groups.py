"""Groups of layers: which there are, and a sketch of each group's own gradients."""

import json
from itertools import combinations, pairwise

import pytest
import torch
from torch import nn

from hf_sketch import ModelSketch
from hf_sketch.model.groups import grouped_names
from hf_sketch.sketches.by_name import OPERATORS
from tests.helpers.tiers import full
from tests.helpers.trained.training import tiny_batch, tiny_bert

SIZE = 64
PATTERNS = {"heads": "pooler|classifier", "attention": r"\.attention\.", "rest": None}
# One matrix and one vector of each group have an operator of their own.
WIDE = tuple(
    (f"{layer}.{kind}", shape)
    for layer in ("a.0", "a.1", "a.2")
    for kind, shape in (("wide", (300, 500)), ("long", (2**16,)), ("short", (70,)))
)


def names_of(sizes, groups):
    return grouped_names([(name, (size,)) for name, size in sizes.items()], groups)


def gradients_of(model):
    """By autograd, in float64."""
    model.zero_grad()
    model(**tiny_batch()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", ["grouped", "blocked", "factored", "flat"])
@pytest.mark.parametrize("groups", [2, 5, PATTERNS], ids=str)
def test_a_row_has_the_sketch_of_each_groups_gradient_end_to_end(layout, groups):
    model = tiny_bert().double().eval()
    sketch = ModelSketch.from_model(model, SIZE, layout, groups=groups)
    gradients = gradients_of(model)
    expected = []
    for group in dict.fromkeys(sketch.groups):
        own = [
            n
            for (n, _), g in zip(sketch.shapes, sketch.groups, strict=True)
            if g == group
        ]
        alone = [n for n in own if n in sketch.operators]
        row = torch.zeros(SIZE, dtype=torch.float64)
        for name in alone:
            eye = torch.eye(gradients[name].numel(), dtype=torch.float64)
            row += (sketch.operators[name] @ eye) @ gradients[name].flatten()
        rest = [gradients[name].flatten() for name in own if name not in alone]
        if rest:
            rest = torch.cat(rest)
            eye = torch.eye(len(rest), dtype=torch.float64)
            row += (sketch.packed_operators[group] @ eye) @ rest
        expected.append(row)
    count = groups if isinstance(groups, int) else len(groups)
    assert len(expected) == count
    assert sketch.row_size == count * SIZE
    torch.testing.assert_close(sketch.sketch(gradients), torch.cat(expected))


def test_parameters_with_operators_of_their_own_are_sketched_as_without_groups():
    """So that numbers of groups add up to those of a single sketch."""
    plain = ModelSketch(WIDE, SIZE, "grouped")
    of = tuple(name[:3] for name, _ in WIDE)
    grouped = ModelSketch(WIDE, SIZE, "grouped", groups=of)
    gradients = {name: torch.randn(shape).double() for name, shape in WIDE}
    long = {name: x for name, x in gradients.items() if "short" not in name}
    torch.testing.assert_close(
        grouped.sketch(long).view(3, SIZE).sum(0), plain.sketch(long)
    )
    short = {name: x for name, x in gradients.items() if "short" in name}
    first, second, third = (
        (of @ torch.eye(70)).double() for of in grouped.packed_operators.values()
    )
    assert not torch.allclose(first, second)  # or their errors would add up
    assert not torch.allclose(second, third)
    assert grouped.sketch(short).view(3, SIZE).count_nonzero(1).min() > 0


@pytest.mark.parametrize("layout", ["grouped", "blocked", "flat"])
def test_inner_products_are_kept_in_each_group(layout):
    """In the mean over seeds, within five standard errors."""
    shapes = tuple((f"h.{i}.{kind}", (24, 20)) for i in (0, 1) for kind in "ab")
    torch.manual_seed(0)
    x, y = ({n: torch.randn(s).double() for n, s in shapes} for _ in range(2))
    y = {name: part + x[name] for name, part in y.items()}
    products = []
    for seed in range(200):
        sketch = ModelSketch(
            shapes, 32, layout, seed, groups=("h.0",) * 2 + ("h.1",) * 2
        )
        rows = (sketch.sketch(part).view(2, 32) for part in (x, y))
        products.append((next(rows) * next(rows)).sum(1))
    products = torch.stack(products)
    exact = torch.stack(
        [
            sum((x[n] * y[n]).sum() for n, _ in shapes if n[:3] == h)
            for h in ("h.0", "h.1")
        ]
    )
    error = products.std(0) / 200**0.5
    assert ((products.mean(0) - exact).abs() < 5 * error).all()


@pytest.mark.parametrize("layout", ["grouped", "blocked", "flat"])
@pytest.mark.parametrize("operator", ["srht", *full(*OPERATORS[:-1])])
def test_the_adjoint_is_exact(layout, operator):
    model = tiny_bert().double()
    sketch = ModelSketch.from_model(model, SIZE, layout, 0, operator, groups=3)
    gradients = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    y = torch.randn(3 * SIZE, dtype=torch.float64)
    lifted = sketch.adjoint(y)
    inner = sum((lifted[name] * gradients[name]).sum() for name in gradients)
    torch.testing.assert_close(sketch.sketch(gradients) @ y, inner)


@pytest.mark.parametrize("layout", ["grouped", "blocked"])
def test_shards_and_parts_add_up(layout):
    sketch = ModelSketch(WIDE, SIZE, layout, groups=("x", "y", "y") * 3)
    gradients = {name: torch.randn(shape).double() for name, shape in WIDE}
    total = torch.zeros(2 * SIZE, dtype=torch.float64)
    for low, high in ((0.0, 0.37), (0.37, 1.0)):
        parts = {}
        for name, gradient in gradients.items():
            start, stop = (int(place * gradient.numel()) for place in (low, high))
            parts[name] = gradient.flatten()[start:stop], start
        total += sketch.sketch_parts(parts)
    torch.testing.assert_close(total, sketch.sketch(gradients))
    only = {"a.1.wide": gradients["a.1.wide"]}
    assert sketch.sketch(only)[SIZE:].count_nonzero() == 0
    assert torch.equal(sketch.sketch({}), torch.zeros(2 * SIZE))
    assert torch.equal(sketch.sketch_parts({}), torch.zeros(2 * SIZE))


def test_it_survives_json_and_one_without_groups_says_nothing_of_them():
    sketch = ModelSketch.from_model(tiny_bert(), SIZE, groups=PATTERNS)
    again = ModelSketch.from_dict(json.loads(json.dumps(sketch.to_dict())))
    assert again == sketch
    assert again.check_value() == sketch.check_value()
    assert hash(again) == hash(sketch)
    plain = ModelSketch.from_model(tiny_bert(), SIZE, groups=1)
    assert "groups" not in plain.to_dict()
    assert plain == ModelSketch.from_model(tiny_bert(), SIZE)
    assert plain != sketch


def test_layers_are_cut_into_runs_of_about_equal_size():
    """As the best of all cuts, by the sum of the squares of their sizes."""
    sizes = {"embed.weight": 50, "head.weight": 9, "head.bias": 1}
    layers = {f"h.{i}.{x}": 3 * i + 5 for i in range(6) for x in ("w", "b")}
    sizes = {"embed.weight": 50, **layers, "head.weight": 9, "head.bias": 1}
    each = [50, *(2 * (3 * i + 5) for i in range(6)), 10]
    names = ["embed", *(f"h.{i}" for i in range(6)), "head"]
    for count in (2, 3, 5, 8):
        found = names_of(sizes, count)
        cuts = [
            (0, *middle, len(each))
            for middle in combinations(range(1, len(each)), count - 1)
        ]

        def cost(cut):
            return sum(sum(each[a:b]) ** 2 for a, b in pairwise(cut))

        best = min(cuts, key=cost)
        runs = [names[a:b] for a, b in pairwise(best)]
        expected = [run[0] if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
        assert list(dict.fromkeys(found)) == expected
    by_name = dict(zip(sizes, names_of(sizes, 8), strict=True))
    assert by_name["h.3.w"] == by_name["h.3.b"] == "h.3"
    assert by_name["head.bias"] == "head"
    with pytest.raises(ValueError, match=r"at most 8, the number of layers .* got 9"):
        names_of(sizes, 9)


def test_patterns_put_each_parameter_into_one_group():
    sizes = dict.fromkeys(["h.1.attn.w", "h.1.mlp.w", "h.10.mlp.w", "head"], 1)
    found = names_of(sizes, {"attention": "attn", "mlp": "mlp", "other": None})
    assert found == ("attention", "mlp", "mlp", "other")
    with pytest.raises(ValueError, match=r"got 'h.10.mlp.w' in \['one', 'ten'\]"):
        names_of(sizes, {"one": r"h\.1", "ten": r"h\.10", "other": None})
    with pytest.raises(ValueError, match=r"in one group, got 'head' in none: change"):
        names_of(sizes, {"attention": "attn", "mlp": "mlp"})
    with pytest.raises(ValueError, match=r"got none for \['norm'\]: leave it out"):
        names_of(sizes, {"norm": "norm", "all": None})


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (0, "groups must be an integer of at least 1, got 0"),
        (True, "groups must be an integer of at least 1, got True"),
        ({}, r"groups must be named, got \{\}"),
        ({"": "a"}, r"groups must be named, got \{'': 'a'\}"),
        ({"a": "("}, r"groups\['a'\] must be a regular expression or None, got '\('"),
        ({"a": 3}, r"groups\['a'\] must be a regular expression or None, got 3"),
    ],
    ids=str,
)
def test_bad_groupings_are_named(groups, message):
    with pytest.raises(ValueError, match=message):
        ModelSketch.from_model(nn.Linear(4, 4), 4, groups=groups)


def test_groups_of_other_parameters_are_refused():
    with pytest.raises(ValueError, match=r"groups must be empty or a name per param"):
        ModelSketch(WIDE, SIZE, groups=("a", "b"))
