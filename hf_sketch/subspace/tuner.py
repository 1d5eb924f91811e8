"""Fine-tuning in a sketched subspace as a PEFT method."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

from peft.functional import cast_adapter_dtype, delete_adapter
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, check_adapters_to_merge
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from hf_sketch.model.sketch import ModelSketch
from hf_sketch.subspace.base import draw_subspace
from hf_sketch.subspace.config import PEFT_TYPE, SubspaceConfig
from hf_sketch.subspace.omega import Coordinates
from hf_sketch.subspace.theta import Theta


class SubspaceModel(BaseTuner):
    """A model whose parameters are theta0 + S.T omega, made by `get_peft_model`.

    Before a forward pass theta is computed, if omega has moved since, and put in the
    places of the parameters as a function of omega. The parameters themselves hold
    theta0 (with `base_on_disk`, theta). One adapter is active at a time.

    Args:
        model: the base model.
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
        self._theta = Theta(model, config.base_on_disk, self._moving)
        self._sketches: dict[str, ModelSketch] = {}

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        self._take_out("add_adapter")
        self._theta.restore()
        base = self._theta.base
        config = self.config_of(adapter_name)
        try:
            sketch = draw_subspace(config, base)
        except ValueError:
            if not self._sketches:
                self._theta.close(keep=False)
            raise
        self._sketches[adapter_name] = sketch
        like = base.parameters[sketch.shapes[0][0]]
        self.coordinates.add(adapter_name, config, like)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        base.find_parameters()

    def set_adapter(
        self, adapter_name: str | list[str], inference_mode: bool = False
    ) -> None:
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        if len(names) > 1:
            raise ValueError(
                "one subspace adapter is active at a time, got "
                f"{names}: call set_adapter with one name, or merge the others."
            )
        self._take_out("set_adapter")
        super().set_adapter(adapter_name, inference_mode)
        self.coordinates.set_adapter(adapter_name, inference_mode)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Leave theta0 + S.T omega in the parameters, without a gradient of omega."""
        names = check_adapters_to_merge(self.coordinates, adapter_names)
        if not names:
            return
        self.set_adapter(names)
        omega = self.omega
        if safe_merge and not omega.isfinite().all():
            raise ValueError(
                f"the coordinates of {names} must be finite, got "
                f"{int((~omega.isfinite()).sum())} that are not: train again."
            )
        self._theta.merge()
        self.coordinates.merged_adapters = list(names)

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`."""
        if not self.coordinates.merged_adapters:
            warnings.warn("no adapter is merged, nothing to do.", stacklevel=2)
            return
        self._theta.unmerge()
        self.coordinates.merged_adapters = []

    def _take_out(self, call: str) -> None:
        """Unmerge with a warning, as PEFT does, if an adapter is merged."""
        merged = self.coordinates.merged_adapters
        if merged:
            warnings.warn(
                f"{call} unmerges the adapters {merged} first. Call "
                "unmerge_adapter() before it.",
                stacklevel=3,
            )
            self.unmerge_adapter()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        if adapter_name in self.coordinates.merged_adapters:
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. "
                "Please unmerge them first."
            )
        if not self.coordinates.merged_adapters:
            self._theta.restore()
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
        return self.coordinates.of(self.active_adapters[0]).weight

    @property
    def model_sketch(self) -> ModelSketch:
        """The active adapter's map S, to all `max_dim` coordinates."""
        return self._sketches[self.active_adapters[0]]

    def _moving(self) -> tuple[str, ModelSketch, Tensor] | None:
        """The active adapter, unless it is disabled or merged."""
        own = self.coordinates
        if own.disable_adapters or own.merged_adapters or not self.active_adapters:
            return None
        return self.active_adapters[0], self.model_sketch, self.omega

    def replace_omega(self, adapter_name: str, values: Tensor) -> nn.Parameter:
        """Give an adapter a new omega, which may have another length."""
        omega = self.coordinates.of(adapter_name)
        trains = omega.weight.requires_grad
        omega.weight = nn.Parameter(values, requires_grad=trains)
        self.config_of(adapter_name).dim = len(values)
        return omega.weight

    def _fit_to_loaded(
        self, module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
    ) -> None:
        """Give omega the length of the one that is loaded, up to `max_dim`."""
        for name in list(self.coordinates.subspace_omega):
            loaded = state_dict.get(f"{prefix}{name}.weight")
            omega = self.coordinates.of(name).weight
            config = self.config_of(name)
            if loaded is None or loaded.numel() == omega.numel():
                continue
            if loaded.dim() == 1 and 1 <= loaded.numel() <= config.largest_dim:
                self.replace_omega(name, omega.new_zeros(loaded.numel()))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Read adapters of earlier commits, too, whose omega had no `.weight`."""
        named = {
            f"{key}.weight" if key.endswith("subspace_omega") else key: tensor
            for key, tensor in state_dict.items()
        }
        return super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, named
        )

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self.coordinates.enable_adapters(enabled)
        if not enabled:
            if self.coordinates.merged_adapters:
                self.unmerge_adapter()
            self._theta.restore()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:  # PEFT writes None and returns the model
        merged = self.coordinates.merged_adapters
        if merge and (adapter_names or not merged):
            self.merge_adapter(adapter_names, safe_merge)
        elif not merge and merged:
            self.unmerge_adapter()
        self._theta.close(keep=merge)
        return super()._unload_and_optionally_merge(
            merge, progressbar, safe_merge, adapter_names
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._theta.base.put_back()
        super()._apply(fn, recurse)
        self._theta.apply(fn)
        return self

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """Tell PEFT to replace no module: parameters move where they are."""
        config = copy.copy(peft_config)
        config.target_modules = DUMMY_TARGET_MODULES
        config.exclude_modules = None
        return config

    def _cast_adapter_dtype(
        self, adapter_name: str, autocast_adapter_dtype: bool = True
    ) -> None:
        cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("no module is replaced")

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
