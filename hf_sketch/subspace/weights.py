"""A model's parameters moved along a subspace, in place."""

from collections.abc import Callable, Collection, Mapping
from tempfile import NamedTemporaryFile

import torch
import xxhash
from torch import Tensor, nn

from hf_sketch.model.sketch import ModelSketch


class MovedWeights:
    """Parameters that hold theta0 + S.T omega, and theta0 beside them.

    theta0 is copied when it is first left; until then nothing is kept.

    Args:
        on_disk: keep the copy in temporary files, mapped to memory: they have no name
            and are gone with the process.
    """

    def __init__(self, on_disk: bool = False) -> None:
        self._on_disk = on_disk
        self._base: dict[str, Tensor] = {}
        self._moved: dict[str, nn.Parameter] = {}

    @torch.no_grad()
    def move(
        self,
        parameters: Mapping[str, nn.Parameter],
        model_sketch: ModelSketch,
        vector: Tensor,
    ) -> None:
        """Set the parameters of the sketch to theta0 + S.T vector, one after another.

        Shapes:
            vector (model_sketch.out_size,)
        """
        self.restore(kept={name for name, _ in model_sketch.shapes})
        for name, part in model_sketch.adjoint_parts(vector):
            parameter = parameters[name]
            if name not in self._base:
                self._base[name] = self._copy(parameter.detach())
            self._moved[name] = parameter
            base = self._base[name].to(part.device)
            torch.add(base, part, out=parameter.detach())

    @torch.no_grad()
    def restore(self, kept: Collection[str] = ()) -> None:
        """Set all parameters but those `kept` back to theta0, bit for bit."""
        for name in set(self._moved).difference(kept):
            self._moved.pop(name).copy_(self._base[name])

    def keep(self) -> None:
        """Take the parameters as they are for theta0."""
        self._base, self._moved = {}, {}

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move or cast the copy of theta0, as `nn.Module._apply` does parameters."""
        for name, tensor in self._base.items():
            changed = function(tensor)
            if changed is not tensor:
                self._base[name] = self._copy(changed) if self._on_disk else changed

    def _copy(self, tensor: Tensor) -> Tensor:
        """A copy in memory, or on the CPU in a file without a name."""
        if not self._on_disk:
            return tensor.clone()
        with NamedTemporaryFile(prefix="hf-sketch-") as file:
            size, dtype = tensor.numel(), tensor.dtype
            mapped = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
        return mapped.view(tensor.shape).copy_(tensor)


def fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """The digest of parameters' names, types, shapes and bits."""
    digest = xxhash.xxh3_128()
    for name, parameter in parameters.items():
        header = f"{name} {parameter.dtype} {tuple(parameter.shape)}\n"
        digest.update(header.encode())
        flat = parameter.detach().reshape(-1).cpu()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
