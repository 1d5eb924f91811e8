"""Fine-tuning in a sketched subspace as a PEFT method."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from peft.functional import delete_adapter
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from hf_sketch.model.sketch import ModelSketch
from hf_sketch.subspace.base import BaseModel, draw_subspace
from hf_sketch.subspace.config import PEFT_TYPE, SubspaceConfig
from hf_sketch.subspace.omega import Coordinates, OmegaGradient
from hf_sketch.subspace.weights import MovedWeights


class SubspaceModel(BaseTuner):
    """A model whose parameters are theta0 + S.T omega, made by `get_peft_model`.

    Before a forward pass its parameters are set to where omega is, if omega has moved
    since, and put into autograd's graph as functions of it. One adapter is active at a
    time.

    Args:
        model: the base model; its parameters are changed in place.
        peft_config: a SubspaceConfig, or one for each adapter.
        adapter_name: name of the first adapter.
        low_cpu_mem_usage: make omega on the meta device.
        state_dict: not used.

    Raises:
        ValueError: the model or the settings do not fit; see `draw_subspace`.
    """

    uses_shared_state = True
    prefix = "subspace_"
    tuner_layer_cls = Coordinates
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - as PEFT has it

    def _pre_injection_hook(
        self, model: nn.Module, config: Any, adapter_name: str
    ) -> None:
        self.coordinates = Coordinates()
        self.coordinates.subspace_omega.register_load_state_dict_pre_hook(
            self._fit_to_loaded
        )
        self._base = BaseModel(model)
        self._weights = MovedWeights(config.base_on_disk)
        self._sketches: dict[str, ModelSketch] = {}
        self._now: tuple[str, Tensor] | None = None
        self._depth = 0
        self._keep_in_graph = False
        self._handles = [
            handle
            for module in self._base.entrances()
            for handle in (
                module.register_forward_pre_hook(cast(Any, self._before)),
                module.register_forward_hook(cast(Any, self._after), always_call=True),
            )
        ]

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        self._to_base()
        config = self.config_of(adapter_name)
        try:
            sketch = draw_subspace(config, self._base)
        except ValueError:
            if not self._sketches:
                self._remove_hooks()
            raise
        self._sketches[adapter_name] = sketch
        like = self._base.parameters[sketch.shapes[0][0]]
        self.coordinates.add(adapter_name, config.dim, like)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._base.find_parameters()

    def set_adapter(
        self, adapter_name: str | list[str], inference_mode: bool = False
    ) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if len(names) > 1:
            raise ValueError(
                "one subspace adapter is active at a time, got "
                f"{names}: call set_adapter with one name, or merge the others."
            )
        if self.coordinates.merged_adapters:
            self.unmerge_adapter()
        super().set_adapter(adapter_name, inference_mode)
        self.coordinates.set_adapter(adapter_name, inference_mode)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Leave theta0 + S.T omega in the parameters, without a gradient of omega."""
        names = adapter_names or self.active_adapters
        self.set_adapter(names)
        self.refresh()
        omega = self.omega
        if safe_merge and not omega.isfinite().all():
            raise ValueError(
                f"the coordinates of {names} must be finite, got "
                f"{int((~omega.isfinite()).sum())} that are not: train again."
            )
        self.coordinates.merged_adapters = list(names)

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`."""
        self.coordinates.merged_adapters = []
        self.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        if adapter_name in self.coordinates.merged_adapters:
            raise ValueError(
                f"{adapter_name} must not be merged to be deleted, got an adapter that "
                "is: call unmerge_adapter() first."
            )
        self._to_base()
        del self.peft_config[adapter_name], self._sketches[adapter_name]
        remaining = delete_adapter(self, adapter_name, self.prefix, Coordinates)
        self.active_adapter = remaining or []

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self.coordinates.set_requires_grad(adapter_names, requires_grad)

    def config_of(self, adapter_name: str) -> SubspaceConfig:
        """The settings of an adapter."""
        return cast(SubspaceConfig, self.peft_config[adapter_name])

    @property
    def omega(self) -> nn.Parameter:
        """The active adapter's coordinates: (dim,)."""
        return self.coordinates.subspace_omega[self.active_adapters[0]]

    @property
    def model_sketch(self) -> ModelSketch:
        """The active adapter's map S, to all `max_dim` coordinates."""
        return self._sketches[self.active_adapters[0]]

    @property
    def _moves(self) -> bool:
        """Whether there is an adapter that moves the parameters."""
        return bool(self.active_adapters) and not self.coordinates.disable_adapters

    def refresh(self) -> None:
        """Set the parameters to where omega is now, as each forward pass does."""
        self._base.leave_graph()
        if self.coordinates.merged_adapters:
            return
        if not self._moves:
            self._to_base()
            return
        omega = self.omega.detach()
        if self._now and self._now[0] == self.active_adapters[0]:
            before = self._now[1]
            if before.shape == omega.shape and torch.equal(before, omega):
                return
        self._move_to(omega)

    def replace_omega(self, adapter_name: str, values: Tensor) -> nn.Parameter:
        """Give an adapter a new omega, which may have another length."""
        omegas = self.coordinates.subspace_omega
        trains = omegas[adapter_name].requires_grad
        omegas[adapter_name] = nn.Parameter(values, requires_grad=trains)
        self.config_of(adapter_name).dim = len(values)
        return omegas[adapter_name]

    def _move_to(self, omega: Tensor) -> None:
        with (
            torch.inference_mode(False),
            torch.autocast(omega.device.type, None, False),
        ):
            self._now = self.active_adapters[0], omega.clone()
            if not omega.any():
                self._weights.restore()
                return
            vector = omega.new_zeros(self.model_sketch.out_size)
            vector[: len(omega)] = omega
            self._weights.move(self._base.parameters, self.model_sketch, vector)

    def _to_base(self) -> None:
        """Set the parameters back to theta0."""
        self._base.leave_graph()
        self._weights.restore()
        self._now = None

    @torch.compiler.disable
    def _before(self, *_: Any) -> None:
        """Before the outermost forward pass: parameters as omega says, in the graph."""
        self._depth += 1
        if self._depth > 1:
            return
        self.refresh()
        if self.coordinates.merged_adapters or not self._moves:
            return
        if torch.is_grad_enabled() and self.omega.requires_grad:
            leave = self._base.leave_graph
            self._keep_in_graph = self._base.recomputes()
            self._base.enter_graph(OmegaGradient(self.model_sketch, self.omega, leave))

    @torch.compiler.disable
    def _after(self, *_: Any) -> None:
        """After it: parameters as they were, unless the backward pass calls again."""
        self._depth -= 1
        if self._depth == 0 and not self._keep_in_graph:
            self._base.leave_graph()

    def _fit_to_loaded(
        self, module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
    ) -> None:
        """Give omega the length of the one that is loaded, up to `max_dim`."""
        for name, omega in list(self.coordinates.subspace_omega.items()):
            loaded = state_dict.get(prefix + name)
            config = self.config_of(name)
            if loaded is None or loaded.numel() == omega.numel():
                continue
            if loaded.dim() == 1 and 1 <= loaded.numel() <= config.largest_dim:
                self.replace_omega(name, omega.new_zeros(loaded.numel()))

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self.coordinates.enable_adapters(enabled)
        self.refresh()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:  # PEFT writes None and returns the model
        if merge:
            self.merge_adapter(adapter_names, safe_merge)
            self._base.leave_graph()
            self._weights.keep()
        else:
            self._to_base()
        self._remove_hooks()
        return super()._unload_and_optionally_merge(
            merge, progressbar, safe_merge, adapter_names
        )

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._base.leave_graph()
        super()._apply(fn, recurse)
        self._weights.apply(fn)
        self._base.find_parameters()
        return self

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("no module is targeted")

    def _inject_parameters(
        self,
        peft_config: Any,
        model: nn.Module,
        adapter_name: str,
        low_cpu_mem_usage: bool,
    ) -> list[str]:
        return [name for name, _ in self._sketches[adapter_name].shapes]


PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SubspaceConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = SubspaceModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = SubspaceModel.prefix
