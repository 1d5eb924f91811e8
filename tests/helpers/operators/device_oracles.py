"""What is the same on the CPU and on another device."""

import torch
from peft import get_peft_model

from hf_sketch import SubspaceConfig
from tests.helpers.trained.training import tiny_batch

WITHOUT_DROPOUT = {
    "num_hidden_layers": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator())


def assert_same_on(device, function, *arguments):
    """A function's result there is the CPU's, to 1e-5 of its norm."""
    expected = function(*arguments)
    got = function(*(x.to(device) for x in arguments))
    assert got.device.type == device.type
    distance = torch.linalg.vector_norm(got.cpu() - expected)
    assert distance <= 1e-5 * torch.linalg.vector_norm(expected)


def assert_same_operator_on(device, operator):
    """Sketches, adjoints, and sketches of outer products and of looked-up rows."""
    assert_same_on(device, lambda x: x @ operator.T, random(3, operator.in_size))
    assert_same_on(device, lambda y: y @ operator, random(3, operator.out_size))
    width = next(n for n in (6, 5, 4, 3, 7, 1) if operator.in_size % n == 0)
    height = operator.in_size // width
    right = random(2, 3, width)
    assert_same_on(device, operator.apply_outer, random(2, 3, height), right)
    ids = torch.arange(6).view(2, 3) * 5 % height
    assert_same_on(device, operator.apply_outer, ids, right)


def subspace_steps(model, device, after_step=lambda: None):
    """Losses of five steps of plain descent in a subspace, and omega after them."""
    wrapped = get_peft_model(model, SubspaceConfig(dim=32, seed=0)).to(device)
    batch = {name: column.to(device) for name, column in tiny_batch(4).items()}
    omega = wrapped.base_model.omega
    losses = []
    for _ in range(5):
        loss = wrapped(**batch).loss
        (gradient,) = torch.autograd.grad(loss, omega)
        with torch.no_grad():
            omega -= 0.1 * gradient
        losses.append(loss.detach())
        after_step()
    return torch.stack([*losses]).cpu(), omega.detach().cpu()
