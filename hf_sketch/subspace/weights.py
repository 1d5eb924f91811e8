"""A model's parameters moved along a subspace."""

from collections.abc import Callable, Collection, Mapping
from tempfile import NamedTemporaryFile

import torch
import xxhash
from torch import Tensor, nn

from hf_sketch.model.sketch import ModelSketch


class MovedWeights:
    """Where a model's parameters have moved to: theta0 + S.T omega.

    In memory, parameters hold theta0 and theta stands beside them until it is merged
    into them. With theta0 on disk it is the other way round.

    Args:
        on_disk: keep theta0 in temporary files, mapped to memory: they have no name and
            are gone with the process.
    """

    def __init__(self, on_disk: bool = False) -> None:
        self.on_disk = on_disk
        self._beside: dict[str, Tensor] = {}  # theta; theta0 on disk or while merged
        self._moved: dict[str, nn.Parameter] = {}

    @torch.no_grad()
    def move(
        self,
        parameters: Mapping[str, nn.Parameter],
        model_sketch: ModelSketch,
        vector: Tensor,
    ) -> None:
        """Compute theta0 + S.T vector for the sketch's parameters.

        Kernels for all of them do it at once, where there are any, or one after another
        is lifted.

        Shapes:
            vector (model_sketch.out_size,)
        """
        names = [name for name, _ in model_sketch.shapes]
        self.restore(kept=set(names))
        base, theta = zip(*(self._pair(n, parameters[n]) for n in names), strict=True)
        if model_sketch.whole_gradients.lift_onto(vector, base, theta):
            return
        parts = (part for _, part in model_sketch.adjoint_parts(vector))
        for here, there, part in zip(base, theta, parts, strict=True):
            torch.add(here.to(part.device), part, out=there)

    def _pair(self, name: str, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        """Return where theta0 and theta of a parameter are."""
        self._moved[name] = parameter
        if name not in self._beside:
            self._beside[name] = self._copy(parameter.detach())
        here, beside = parameter.detach(), self._beside[name]
        return (beside, here) if self.on_disk else (here, beside)

    def at(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Return where a parameter has moved to; itself if it has not."""
        if self.on_disk or name not in self._moved:
            return parameter
        return self._beside[name]

    @torch.no_grad()
    def restore(self, kept: Collection[str] = ()) -> None:
        """Leave all parameters but those `kept` at theta0, bit for bit."""
        for name in set(self._moved).difference(kept):
            parameter = self._moved.pop(name)
            if self.on_disk:
                parameter.copy_(self._beside[name])
            else:
                del self._beside[name]

    def forget(self) -> None:
        """Forget theta0, which is to change in the parameters."""
        self._beside.clear()

    def exchange(self) -> None:
        """Merge theta into the parameters, or take it out again; nothing is copied."""
        if self.on_disk:
            return
        for name, parameter in self._moved.items():
            theirs = parameter.data
            parameter.data, self._beside[name] = self._beside[name], theirs

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move or cast what stands beside, as `nn.Module._apply` does parameters."""
        for name, tensor in self._beside.items():
            changed = function(tensor)
            if changed is not tensor:
                self._beside[name] = self._copy(changed) if self.on_disk else changed

    def _copy(self, tensor: Tensor) -> Tensor:
        """A copy in memory, or on the CPU in a file without a name."""
        if not self.on_disk:
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
