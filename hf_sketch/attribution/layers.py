"""Scores of some groups of layers."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from hf_sketch.attribution.methods import Method
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.store.blocks import RowBlock


@dataclass(frozen=True, eq=False)
class OfLayers(Method):
    """A method's score of some groups of layers, or with a weight for each.

    Numbers of queries and rows are multiplied by the root of their group's weight, and
    so is what M makes of them: q @ W^(1/2) M W^(1/2) @ r. Where M is a block for each
    group this is the weighted sum of the groups' scores; "cosine" has the norms of what
    is left.

    Shapes:
        layer_weights (row_size,)

    Args:
        method: the method.
        layer_weights: of each number of a row; see `LayerGroups.weights`.
    """

    method: Method
    layer_weights: Tensor
    columns: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", self.method.columns)

    @property
    def averaged(self) -> bool:
        return self.method.averaged

    def transform(self, sketches: Tensor) -> Tensor:
        root = self.layer_weights.sqrt()
        return self.method.transform(sketches * root) * root

    def weights(self, block: RowBlock) -> Tensor | None:
        return self.method.weights(
            replace(block, kept=block.kept * self.layer_weights.sqrt())
        )

    def problem(self, model_sketch: ModelSketch, column_names: list[str]) -> str | None:
        return self.method.problem(model_sketch, column_names)
