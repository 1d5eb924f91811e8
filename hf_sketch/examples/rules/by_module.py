"""The rule of each kind of module."""

from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_sketch.examples.rules.base import NoRule, Rule
from hf_sketch.examples.rules.convolution import Convolution
from hf_sketch.examples.rules.embedding import Embedding
from hf_sketch.examples.rules.linear import Linear
from hf_sketch.examples.rules.norms import Elementwise, LayerNorm


def rule_for(module: nn.Module, path: str, names: dict[str, str]) -> Rule:
    """Return the rule that may fit the module's forward pass; else `NoRule`.

    A subclass counts as the class whose forward pass it has.

    Raises:
        ValueError: the module's per-example gradients depend on the whole batch.
    """
    # FSDP2 derives a class of its own from this one.
    kind = type(module).__mro__[2 if isinstance(module, FSDPModule) else 0]
    forward = kind.forward
    if isinstance(module, nn.Embedding):
        scale = 1.0 if forward is nn.Embedding.forward else None
        return Embedding(module, path, names, scale)
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return Linear(module, path, names, input_side=0)
    if forward in _RULES:
        return _RULES[forward](module, path, names)
    if [parameter.dim() for parameter in module.parameters()] == [1]:
        return Elementwise(module, path, names)
    return NoRule(module, path, names)


_RULES: dict[object, type[Rule]] = {
    nn.Linear.forward: Linear,
    nn.LayerNorm.forward: LayerNorm,
    nn.Conv1d.forward: Convolution,
    nn.Conv2d.forward: Convolution,
    nn.Conv3d.forward: Convolution,
}
