"""The rule of each kind of module."""

from torch import nn

from hf_sketch.examples.rules.base import NoRule, Rule
from hf_sketch.examples.rules.convolution import Convolution
from hf_sketch.examples.rules.embedding import Embedding
from hf_sketch.examples.rules.linear import Linear
from hf_sketch.examples.rules.norms import Elementwise, LayerNorm
from hf_sketch.examples.rules.uses import Uses


def rule_for(module: nn.Module, path: str, names: dict[str, str]) -> Rule:
    """Return the rule that may fit the module's forward pass; else `NoRule`.

    A subclass counts as the class whose forward pass it has.

    Raises:
        ValueError: the module's per-example gradients depend on the whole batch.
    """
    forward = type(module).forward
    if isinstance(module, nn.Embedding):
        return Embedding(module, path, names)
    if forward is nn.Linear.forward:
        return Linear(module, path, names, input_side=1)
    if forward in _RULES:
        return _RULES[forward](module, path, names)
    home = str(forward.__module__)
    if forward.__qualname__ == "Conv1D.forward" and home.startswith("transformers."):
        return Linear(module, path, names, input_side=0)
    if [parameter.dim() for parameter in module.parameters()] == [1]:
        return Elementwise(module, path, names)
    own = {name: module.get_parameter(name).dim() for name in names}
    multiplied = all(dim in (2, 3) or "bias" in name for name, dim in own.items())
    if multiplied and not home.startswith("torch.nn."):
        return Uses(module, path, names)
    return NoRule(module, path, names)


_RULES: dict[object, type[Rule]] = {
    nn.LayerNorm.forward: LayerNorm,
    nn.Conv1d.forward: Convolution,
    nn.Conv2d.forward: Convolution,
    nn.Conv3d.forward: Convolution,
}
