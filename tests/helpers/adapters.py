"""Models with a subspace adapter, and plain copies at the same weights."""

import copy

import torch
from peft import get_peft_model

from hf_sketch import SubspaceConfig


def adapted(model, dim=16, **settings):
    """With an adapter whose omega is not zero."""
    peft_model = get_peft_model(model, SubspaceConfig(dim=dim, **settings))
    tuner = peft_model.base_model
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        tuner.omega.copy_(torch.randn(dim, generator=generator) * 0.01)
    return peft_model, tuner


def lifted(tuner, dtype=None):
    """S.T omega by parameter, in omega's dtype or another."""
    omega = tuner.omega.detach()
    vector = omega.new_zeros(tuner.model_sketch.out_size, dtype=dtype)
    vector[: len(omega)] = omega
    return tuner.model_sketch.adjoint(vector)


def moved_copy(base, tuner):
    """A plain copy of the base model at theta0 + S.T omega."""
    model = copy.deepcopy(base)
    lift = lifted(tuner)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in lift:
                parameter += lift[name]
    return model
