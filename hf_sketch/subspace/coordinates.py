"""The coordinates of subspace adapters, as a layer that PEFT knows."""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class Coordinates(nn.Module, BaseTunerLayer):
    """The coordinates omega of all adapters; what PEFT takes for the adapter's layer.

    Shapes:
        subspace_omega[name] (dim,)
    """

    adapter_layer_names = ("subspace_omega",)

    def __init__(self) -> None:
        super().__init__()
        self.subspace_omega = nn.ParameterDict()
        self.merged_adapters: list[str] = []

    def add(self, adapter_name: str, dim: int, like: Tensor) -> None:
        """Zeros for a new adapter, in float32 at least."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        omega = torch.zeros(dim, dtype=dtype, device=like.device)
        self.subspace_omega[adapter_name] = nn.Parameter(omega)
