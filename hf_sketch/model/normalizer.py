"""Adam's second moments, by whose roots gradients are divided before sketching."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import xxhash
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_sketch.model.names import named_parameters

_MOMENT, _STEP = "exp_avg_sq", "step"


@dataclass(frozen=True, eq=False)
class Normalizer:
    """Divides each gradient element by the root of its second moment, as Adam does.

    The moments v of a matrix are kept as their means over rows and over columns, v ~ a
    b^T / mean(v), so that each side of an outer product is scaled by itself, and a
    gradient is never formed. Dimensions but the last count as rows for experts, (e, m,
    n); other tensors have their first dimension as rows. Vectors keep their moments as
    they are. The square of the optimizer's eps is added to each: gradients that are
    rounding errors stay small. What training has not reached, such as the embeddings of
    tokens that it has not seen, counts as zero.

    Two normalizers are equal if their numbers are.

    >>> model = nn.Linear(3, 2, bias=False)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> model(torch.ones(1, 3)).sum().backward()  # a gradient of ones
    >>> optimizer.step()
    >>> normalizer = Normalizer.from_optimizer(model, optimizer)
    >>> normalizer.scale("weight", torch.full((1, 6), 7.0)).round().tolist()
    [[7.0, 7.0, 7.0, 7.0, 7.0, 7.0]]

    Args:
        moments: moments by parameter name, (a, b) of a matrix, and (v,) of a vector.
        step: the optimizer step after which they were taken.

    Reference:
        Xia et al. 2024 (LESS), arXiv:2402.04333, Sec. 3, whose first moments are left
        out; the factors are those of Shazeer and Stern 2018 (Adafactor),
        arXiv:1804.04235, algorithm 1.
    """

    moments: Mapping[str, tuple[Tensor, ...]] = field(repr=False)
    step: int

    @classmethod
    def from_optimizer(cls, model: nn.Module, optimizer: Optimizer) -> "Normalizer":
        """Take the second moments of an optimizer of Adam's kind.

        Raises:
            ValueError: it has none: it has not stepped, or is of another kind.
        """
        inner = getattr(optimizer, "optimizer", optimizer)  # within Accelerate's
        settings = {
            id(parameter): (group.get("betas", (0.0, 0.0))[1], group.get("eps", 0.0))
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        moments: dict[str, tuple[Tensor, ...]] = {}
        steps = 0
        for name, parameter in named_parameters(model).items():
            if not parameter.requires_grad:
                continue
            state: dict[str, Any] = optimizer.state.get(parameter, {})
            if _MOMENT not in state or not float(state.get(_STEP, 0)):
                raise ValueError(
                    f"normalize='adam' needs the second moments of {name!r}, and "
                    f"{type(inner).__name__} has none. Train some steps with an "
                    "optimizer of Adam's kind, then record as training resumes from "
                    "their checkpoint: trainer.train(resume_from_checkpoint=...)."
                )
            steps = max(steps, int(state[_STEP]))
            rate, least = settings[id(parameter)]
            unbiased = state[_MOMENT].float().cpu() / (1 - rate ** int(state[_STEP]))
            factors = _factors(unbiased)
            moments[name] = tuple((x + least**2).where(x > 0, 0) for x in factors)
        return cls(moments, steps)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise unless there are moments of all these parameters."""
        for name, shape in shapes.items():
            ours = [len(x) for x in self.moments.get(name, ())]
            if math.prod(ours) != math.prod(shape) or not ours:
                raise ValueError(
                    f"the normalizer has moments of {ours} numbers for {name!r} of "
                    f"shape {shape}: take it from the optimizer of this model, with "
                    "the same parameters trainable."
                )

    def to_dict(self) -> dict[str, Any]:
        """Return what identifies it, as JSON-ready values."""
        return {"kind": "adam", "step": self.step, "xxh3_128": self.digest}

    def scale(self, name: str, rows: Tensor, start: int = 0) -> Tensor:
        """Scale rows of a parameter, or their coordinates from `start` on.

        Shapes:
            rows (b, length), returns (b, length)
        """
        sides, length = self._scales[name], rows.shape[1]
        if len(sides) == 1 or length != math.prod(map(len, sides)):
            return rows * self.elements(name, start, start + length, rows)
        left, right = (self.side(name, side, rows) for side in range(2))
        matrix = rows.unflatten(1, (len(left), len(right)))
        return (matrix * left.unsqueeze(1)).mul_(right).flatten(1)

    def sides(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the factors of a parameter's rows and columns; a vector is one row."""
        *rows, columns = self._scales[name]
        return rows[0] if rows else torch.ones(1), columns

    def side(self, name: str, side: int, like: Tensor) -> Tensor:
        """Return the factors of one side of a matrix's outer products: (length,).

        Those of experts' sides lie one after the other.
        """
        key = name, side, like.device, like.dtype
        if key not in self._placed:  # each copy there is waited for
            self._placed[key] = self._scales[name][side].to(like)
        return self._placed[key]

    def scale_outer(
        self, name: str, left: Tensor, right: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Scale both sides of outer products; None if they are not rows and columns.

        Integer `left` stands for one-hot vectors.
        """
        found = self._scales[name]
        if len(found) == 1 or right.shape[-1] != len(found[1]):
            return None
        rows, columns = (self.side(name, side, right) for side in range(2))
        right = right * columns
        if left.is_floating_point():
            return left * rows, right
        return left, right * rows[left].unsqueeze(-1)

    def elements(self, name: str, start: int, stop: int, like: Tensor) -> Tensor:
        """Return factors of some of a parameter's elements, row by row."""
        *rows, columns = self._scales[name]
        if not rows:
            return columns[start:stop].to(like.device, like.dtype)
        width = len(columns)
        first, last = start // width, -(-stop // width)
        found = torch.outer(rows[0][first:last], columns).flatten()
        found = found[start - first * width : stop - first * width]
        return found.to(like.device, like.dtype)

    @cached_property
    def _placed(self) -> dict[tuple[str, int, torch.device, torch.dtype], Tensor]:
        """Factors of sides, by device and type."""
        return {}

    @cached_property
    def digest(self) -> str:
        """The checksum of all numbers."""
        return xxhash.xxh3_128_hexdigest(self.to_bytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Normalizer) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def to_bytes(self) -> bytes:
        """Return the numbers as a file of safetensors."""
        tensors = {
            f"{place}.{name}": x.contiguous()
            for name, factors in sorted(self.moments.items())
            for place, x in enumerate(factors)
        }
        return save(tensors, {"step": str(self.step)})

    @classmethod
    def from_bytes(cls, content: bytes, step: int) -> "Normalizer":
        """Read what `to_bytes` wrote."""
        moments: dict[str, tuple[Tensor, ...]] = {}
        for key, x in sorted(load(content).items()):  # place by place
            if x.dtype != torch.float32 or x.dim() != 1:
                raise ValueError(f"{key!r} is no vector of float32")
            name = key.partition(".")[2]
            moments[name] = (*moments.get(name, ()), x)
        return cls(moments, step)

    @cached_property
    def _scales(self) -> dict[str, tuple[Tensor, ...]]:
        """Factors of rows and columns, or of elements, by parameter."""
        return {name: _scales(factors) for name, factors in self.moments.items()}


def _factors(moment: Tensor) -> tuple[Tensor, ...]:
    """Return the means over columns and over rows; of a vector, itself."""
    if moment.dim() < 2:
        return (moment.reshape(-1).clone(),)
    rows = math.prod(moment.shape[:-1]) if moment.dim() == 3 else len(moment)
    matrix = moment.reshape(rows, -1)
    return matrix.mean(1), matrix.mean(0)


def _scales(factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return 1 / sqrt(v) for a vector, and its two factors for a matrix."""
    power = 0.25 if len(factors) == 2 else 0.0
    return tuple((x.rsqrt() * x.mean() ** power).where(x > 0, 0) for x in factors)
