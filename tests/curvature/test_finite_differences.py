"""Parameters are moved there and back, bit for bit, in half of a copy's memory."""

import pytest
import torch

from hf_sketch.curvature.finite_differences import _Before, central_difference
from hf_sketch.recipes.tables.measure import peak_extra_bytes

STEP = 3e-5  # of |theta|


def bits(x):
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int64)


def awkward(size=1000):
    """Zeros of both signs, numbers far below the step, and one that changes sign."""
    theta = torch.randn(size, generator=torch.Generator().manual_seed(0))
    theta[:4] = torch.tensor([0.0, -0.0, 1e-42, -1e-30])
    theta[4:40] *= 1e-6
    theta[40:43] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    return theta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
def test_what_moved_a_little_is_restored_bit_for_bit(dtype, turned):
    theta = awkward().to(dtype).view(20, 50)
    theta = theta.T if turned else theta
    moved = theta + 3e-5 * torch.randn(theta.shape)
    before = _Before(theta.clone())
    before.compress(moved)
    assert (before._theta is None) == (dtype == torch.float32)
    assert torch.equal(bits(before.restored(moved)), bits(theta))
    assert before.restored(moved).shape == theta.shape


def test_what_moved_far_is_kept_whole():
    theta = torch.randn(1000)
    before = _Before(theta.clone())
    before.compress(theta + 1)
    assert before._theta is not None
    assert torch.equal(before.restored(theta + 1), theta)


def model_of(*shapes):
    generator = torch.Generator().manual_seed(1)
    parameters = {
        f"p{i}": torch.nn.Parameter(torch.randn(shape, generator=generator))
        for i, shape in enumerate(shapes)
    }
    direction = {n: torch.randn(p.shape) for n, p in parameters.items()}
    norm = float(torch.cat([d.reshape(-1) for d in direction.values()]).norm())
    return parameters, direction, norm


def test_both_sides_are_where_float32_puts_them_and_theta_comes_back():
    parameters, direction, norm = model_of((30, 20), (7,), ())
    with torch.no_grad():
        parameters["p1"][:3] = 0.0
    theta = {n: p.detach().clone() for n, p in parameters.items()}
    seen = []

    def evaluate():
        seen.append({n: p.detach().clone() for n, p in parameters.items()})
        return [torch.ones(1)]

    central_difference(parameters, direction.items, norm, evaluate)
    ahead, behind = seen
    size = torch.cat([p.reshape(-1) for p in theta.values()]).norm()
    step = STEP * float(size) / norm
    for name, start in theta.items():
        there = start.add(direction[name], alpha=step)
        torch.testing.assert_close(ahead[name], there, rtol=1e-6, atol=1e-9)
        assert torch.equal(behind[name], (start - ahead[name]) + start)
        assert torch.equal(bits(parameters[name].detach()), bits(start))


@pytest.mark.parametrize("call", [1, 2])
def test_an_error_on_the_way_leaves_theta_as_it_was(call):
    parameters, direction, norm = model_of((30, 20), (7,))
    theta = {n: p.detach().clone() for n, p in parameters.items()}
    calls = []

    def evaluate():
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt
        return [torch.ones(1)]

    with pytest.raises(KeyboardInterrupt):
        central_difference(parameters, direction.items, norm, evaluate)
    for name, start in theta.items():
        assert torch.equal(bits(parameters[name].detach()), bits(start))


def test_only_half_of_a_copy_is_held_meanwhile():
    shape = (1000, 100)
    parameters, direction, norm = model_of(*[shape] * 40)
    one = 4 * shape[0] * shape[1]
    extra = peak_extra_bytes(
        lambda: central_difference(
            parameters, direction.items, norm, lambda: [torch.ones(1)]
        )
    )
    assert extra < 0.56 * 40 * one + 5 * one  # five of one parameter come and go
