"""Products with exact Hessians, and a small model with any function inside."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_sketch import HessianOperator
from tests.helpers.trained.tiny_models import DoublePrecision

AUTOGRAD, FINITE = "autograd", "finite_difference"
BOTH = pytest.mark.parametrize("mode", [AUTOGRAD, FINITE])
TOLERANCE = {AUTOGRAD: 1e-5, FINITE: 5e-3}  # in float32


def relative(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def flat(vector):
    return torch.cat([part.reshape(-1) for part in vector.values()])


def unflat(model, x):
    parameters = dict(model.named_parameters())
    parts = x.split([p.numel() for p in parameters.values()])
    return {
        n: part.view_as(p).to(p)
        for (n, p), part in zip(parameters.items(), parts, strict=True)
    }


def theta_of(model):
    return flat({n: p.detach() for n, p in model.named_parameters()})


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def direction(model, seed=0):
    """A vector of normal numbers in the model's parameter space."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for n, p in trainable(model).items()
    }


def mean_of_losses(outputs):
    losses = [o["loss"] for o in outputs]
    return sum(losses) / len(losses)


def exact(model, batches, vector, loss_of=mean_of_losses):
    """H v by torch's own `hvp`, of a copy in float64: none of our code runs."""
    model = copy.deepcopy(model).double().eval()
    parameters = trainable(model)

    def loss(*theta):
        named = dict(zip(parameters, theta, strict=True))
        return loss_of([functional_call(model, named, (), b) for b in batches])

    theta = tuple(parameters.values())
    vectors = tuple(vector[name].double() for name in parameters)
    with DoublePrecision(), sdpa_kernel(SDPBackend.MATH):
        products = torch.autograd.functional.hvp(loss, theta, vectors)[1]
    return torch.cat([part.flatten() for part in products])


def cross_entropy(outputs, batches, shift):
    """Sum over all tokens with labels, and how many there are."""
    total = count = 0
    for output, batch in zip(outputs, batches, strict=True):
        logits, labels = output.logits, batch["labels"]
        if shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        total += nn.functional.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        count += int((labels != -100).sum())
    return total, count


def assert_right(model, batch, mode, **options):
    """The product of a model in float32 is that of its copy in float64."""
    vector = direction(model)
    got = HessianOperator(model, [batch], mode=mode, **options) @ vector
    wanted = exact(model, [batch], vector)
    assert relative(flat(got).double(), wanted) < TOLERANCE[mode]


class Once(torch.autograd.Function):
    """Squares its input; its gradient cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Constant(torch.autograd.Function):
    """Squares its input; the gradient is made in the forward pass, as by fused losses.

    A second backward pass takes it for a constant.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 2 * x.detach()
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.slope * gradient


class Head(nn.Module):
    """A classifier with a function between its two linear maps."""

    main_input_name = "x"

    def __init__(self, function=torch.square, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.first = nn.Linear(4, 5)
        self.last = nn.Linear(5, 3)
        self.to(dtype)

    def forward(self, x, labels):
        logits = self.last(self.function(self.first(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def head_batch(rows=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 4, generator=generator)
    return {"x": x.to(dtype), "labels": torch.arange(rows) % 3}
