"""A subspace adapter grown to more dimensions, with its optimizer."""

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_sketch.subspace.tuner import SubspaceModel

# What optimizers call their states.
_FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def grow_subspace(
    model: PeftModel, dim: int, optimizer: Optimizer | None = None
) -> None:
    """Let the active subspace adapter move in `dim` dimensions, the old ones included.

    The model's function stays the same: theta0 + S[:dim].T omega has its old
    coordinates and new ones that are zero. The step size rule: a coordinate moves theta
    as far as before, so that a step of Adam on omega with learning rate r moves each
    parameter by r * sqrt(dim / max_dim) in the root of the mean square. Of a random
    subspace a gradient has a part that grows with the root of dim, and so does the step
    that it can guide.

    The optimizer keeps its state. New coordinates start with a first moment of zero and
    the mean second moment of the old ones, whose gradients have the same distribution;
    Adam has no step count of their own, so that zeros would make their first step three
    times the learning rate.

    DDP does not notice: wrap the model again, unless `IntrinsicDimensionCallback` grows
    it, which sees to that.

    Args:
        model: model returned by `get_peft_model(model, SubspaceConfig(...))`.
        dim: the new length of omega, at least the old one and at most `max_dim`.
        optimizer: gets the new parameter in the place of the old one, with its state;
            None if it will be made later.

    Raises:
        TypeError: the model has no subspace adapter.
        ValueError: `dim` is out of range, the optimizer does not hold omega, or its
            state has other tensors of omega's length than those of Adam, SGD, RMSprop
            and Adagrad.
    """
    tuner = subspace_of(model)
    omega, (name, *_) = tuner.omega, tuner.active_adapters
    config = tuner.config_of(name)
    if not len(omega) <= dim <= config.largest_dim:
        raise ValueError(
            f"dim must be in [{len(omega)}, max_dim={config.largest_dim}], got {dim}: "
            "make the adapter with a larger SubspaceConfig(max_dim=...), which draws "
            "the subspace that it grows in."
        )
    if dim == len(omega):
        return
    moments = {} if optimizer is None else _moments(optimizer, omega)
    grown = {
        key: _grown(moment, dim, key in _SECOND_MOMENTS)
        for key, moment in moments.items()
    }
    new = tuner.replace_omega(name, _grown(omega.detach(), dim, False))
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group["params"] = [new if p is omega else p for p in group["params"]]
    if moments:
        optimizer.state[new] = {**optimizer.state.pop(omega), **grown}


def subspace_of(model: nn.Module) -> SubspaceModel:
    """Return the part of a model that holds its subspace adapter.

    Raises:
        TypeError: it has none.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, SubspaceModel):
        raise TypeError(
            f"the model must have a subspace adapter, got {type(tuner).__name__}: call "
            "get_peft_model(model, SubspaceConfig(...))."
        )
    return tuner


def _moments(optimizer: Optimizer, omega: nn.Parameter) -> dict[str, Tensor]:
    """The tensors of omega's length in the state of the optimizer that trains it."""
    if not any(p is omega for g in optimizer.param_groups for p in g["params"]):
        raise ValueError(
            "the optimizer must train the adapter's coordinates, got one that does not "
            "hold them: make it from the model's parameters after the last growth."
        )
    tensors = {
        name: value
        for name, value in optimizer.state.get(omega, {}).items()
        if isinstance(value, Tensor) and value.shape == omega.shape
    }
    known = _FIRST_MOMENTS + _SECOND_MOMENTS
    unknown = [name for name in tensors if name not in known]
    if unknown:
        raise ValueError(
            f"the optimizer's state must be among {list(known)} to be grown, got "
            f"{unknown} of {type(optimizer).__name__}: train with optim='adamw_torch'."
        )
    return tensors


def _grown(tensor: Tensor, dim: int, fill_with_mean: bool) -> Tensor:
    """A vector with zeros or its mean up to a length."""
    fill = tensor.mean() if fill_with_mean else torch.zeros_like(tensor[0])
    return torch.cat([tensor, fill.expand(dim - len(tensor))])
