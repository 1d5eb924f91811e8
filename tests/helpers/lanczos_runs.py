"""Lanczos runs on small dense matrices."""

import os
import signal

import torch

from hf_sketch import lanczos
from tests.helpers.operators.symmetric import Matrix, goe

SIZE = 120
STEPS = 24
FIELDS = ("alphas", "betas", "eigenvalues", "residuals", "weights", "rotation")


def run(operator, steps, **arguments):
    return lanczos(operator, steps, progress=False, **arguments)


def operator(**arguments):
    return Matrix(goe(SIZE), **arguments)


def run_and_die(directory, step):
    """Kills this process at a product."""

    def die(v):
        os.kill(os.getpid(), signal.SIGKILL)

    dying = operator(spoilt_product=step, spoil=die)
    run(dying, STEPS, checkpoint=directory, checkpoint_every=3)


def assert_same_bits(left, right):
    for name in FIELDS:
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert torch.equal(left.basis.rows, right.basis.rows)
