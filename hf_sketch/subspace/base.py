"""The base model of a subspace adapter: its parameters, and where they are used."""

from collections.abc import Collection, Iterable, Iterator
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sketch.model.fsdp import check_whole
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.subspace.config import SubspaceConfig
from hf_sketch.subspace.weights import fingerprint

_CHECKPOINTING = "gradient_checkpointing"  # the attribute that transformers sets


class BaseModel:
    """A model whose modules can use other tensors in the places of its parameters.

    Args:
        model: as it is before the first adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters: dict[str, nn.Parameter] = {}
        self.find_parameters()
        frozen = [n for n, p in self.parameters.items() if not p.requires_grad]
        # PEFT freezes all of a model's, and leaves them so when it unloads.
        self.frozen = frozen if len(frozen) < len(self.parameters) else []
        self._replaced: list[tuple[nn.Module, str, nn.Parameter]] = []

    def find_parameters(self) -> None:
        """Look for the parameters again, by name, without those that PEFT added."""
        named = self.model.named_parameters()
        self.parameters = {
            name.replace("original_module.", ""): parameter
            for name, parameter in named
            if ".modules_to_save." not in name
        }

    def entrances(self) -> Iterator[nn.Module]:
        """The modules that are called from outside: `generate` calls encoders."""
        for module in self.model.modules():
            if module is self.model or isinstance(module, PreTrainedModel):
                yield module

    def uses(self, names: Collection[str]) -> list[tuple[nn.Module, str, str]]:
        """Return where modules use parameters: module, attribute, parameter's name.

        Raises:
            ValueError: parameters were replaced.
        """
        own = {id(self.parameters[name]): name for name in names}
        found = [
            (module, attribute, own[id(parameter)])
            for module in self.model.modules()
            for attribute, parameter in vars(module)["_parameters"].items()
            if id(parameter) in own
        ]
        replaced = set(names) - {name for *_, name in found}
        if replaced:
            raise ValueError(
                "the model must keep the parameters that it had when the adapter was "
                f"made, got others in the places of {len(replaced)}, {min(replaced)} "
                "among them: do not exchange them after get_peft_model, as FSDP and "
                "DeepSpeed do (DDP does not)."
            )
        return found

    def put(
        self, uses: Iterable[tuple[nn.Module, str, str]], tensors: Iterable[Tensor]
    ) -> None:
        """Let modules use tensors in the places of parameters, until `put_back`."""
        for (module, attribute, name), tensor in zip(uses, tensors, strict=True):
            self._replaced.append((module, attribute, self.parameters[name]))
            _put(module, attribute, tensor)

    def recomputes(self) -> bool:
        """Whether the backward pass calls modules again: activation checkpointing.

        Raises:
            ValueError: it does so in backward passes of their own, which would each
                reach omega with a part of the gradient.
        """
        marked = [m for m in self.model.modules() if vars(m).get(_CHECKPOINTING)]
        for module in marked:
            function = vars(module).get("_gradient_checkpointing_func")
            if isinstance(function, partial) and function.keywords.get("use_reentrant"):
                raise ValueError(
                    "activation checkpointing must be non-reentrant under a subspace "
                    f"adapter, got use_reentrant=True at {type(module).__name__}: pass "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
        return bool(marked)

    def put_back(self) -> None:
        """Put the parameters back in their places."""
        while self._replaced:
            _put(*self._replaced.pop())


def draw_subspace(config: SubspaceConfig, base: BaseModel) -> ModelSketch:
    """The map S of an adapter, from its settings and the base model at theta0.

    Fills in `exclude_parameters` and `base_fingerprint` of a new adapter's settings.

    Raises:
        ValueError: no parameter is covered, `max_dim` is above their number, the base
            model is quantized, in shards, spread over devices or has recurrent layers,
            or it is not the one that the adapter was trained on.
    """
    loaded = config.base_fingerprint is not None
    if not loaded and base.frozen:
        excluded = config.exclude_parameters or []
        if isinstance(excluded, str):
            excluded = [name for name in base.parameters if not config.covers(name)]
        config.exclude_parameters = [*excluded, *base.frozen]
    covered = {n: p for n, p in base.parameters.items() if config.covers(n)}
    _check_covered(config, covered, base)
    found = fingerprint(covered)
    if not loaded:
        config.base_fingerprint = found
    elif found != config.base_fingerprint:
        first = next(iter(covered.values()))
        raise ValueError(
            "the base model's parameters must have the fingerprint "
            f"{config.base_fingerprint} of those that the adapter was trained on, got "
            f"{found} ({first.dtype}): load the same weights in the same dtype, or set "
            "base_fingerprint=None in the adapter's SubspaceConfig to use others."
        )
    shapes = tuple((name, tuple(p.shape)) for name, p in covered.items())
    assert config.layout is not None
    assert config.operator is not None
    settings = config.largest_dim, config.layout, config.seed, config.operator
    sketch = ModelSketch(shapes, *settings)
    try:
        sketch.sketch_sum()  # draws the operators of all parameters
    except ValueError as error:
        raise ValueError(
            f"the operator {config.operator!r} does not fit all parameters in the "
            f"layout {config.layout!r}: {error} Or pass layout='flat'."
        ) from error
    return sketch


def _check_covered(
    config: SubspaceConfig, covered: dict[str, nn.Parameter], base: BaseModel
) -> None:
    """Raise where a subspace cannot be laid through these parameters."""
    elements = sum(parameter.numel() for parameter in covered.values())
    if not covered:
        raise ValueError(
            "a subspace needs parameters, got none of the model's "
            f"{len(base.parameters)}: see target_parameters, exclude_parameters and "
            "modules_to_save, and which ones require grad."
        )
    if config.largest_dim > elements:
        raise ValueError(
            f"dim and max_dim must be at most {elements}, the number of parameters, "
            f"got {config.largest_dim}: pass a smaller one."
        )
    quantized = [n for n, p in covered.items() if not p.is_floating_point()]
    if quantized or getattr(base.model, "is_quantized", False):
        raise ValueError(
            "a subspace needs parameters in floating point, got a quantized model "
            f"({', '.join(quantized[:3]) or 'is_quantized'}): load it without a "
            "quantization_config."
        )
    check_whole("a subspace", covered.values())
    devices = {str(parameter.device) for parameter in covered.values()}
    if len(devices) > 1:
        raise ValueError(
            f"all parameters must be on one device, got {sorted(devices)}: load the "
            "model without device_map='auto'."
        )
    for name, module in base.model.named_modules():
        if isinstance(module, nn.RNNBase):
            raise ValueError(
                "modules must read their parameters when they are called, got "
                f"{type(module).__name__} at {name}, which keeps a list of its own: "
                "leave it out by exclude_parameters, or use another model."
            )


def _put(module: nn.Module, attribute: str, tensor: Tensor) -> None:
    """Set a parameter's place, also to a tensor that is not a Parameter."""
    vars(module)["_parameters"][attribute] = tensor
