"""Tiny configurations: every size shrunk by its name, without dropout."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from hf_sketch.recipes.tables.census.media_models import MEDIA_MODELS
from hf_sketch.recipes.tables.census.sizes import SIZES, VOCABULARY
from hf_sketch.recipes.tables.census.text_models import TEXT_MODELS

OVERRIDES = {**TEXT_MODELS, **MEDIA_MODELS}
CLASSES = 3
LENGTH = 16
_FIRST_SPECIAL = 100  # ordinary tokens lie below
_TOKENS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1}
_IN_DICTS = {"mrope_section": [2, 1, 1]}
_CHANCES = ("drop", "mask_time_prob", "mask_feature_prob", "jitter", "noise")
_MOST_LAYERS = 4
_ALWAYS = {"pad_token_id": 0, "decoder_start_token_id": 1}


def config_of(model_class: Any) -> PreTrainedConfig:
    """Return a class's configuration of some thousand parameters, without dropout."""
    config_class: type[PreTrainedConfig] = model_class.config_class
    special = dict(OVERRIDES.get(config_class.model_type, {}))
    special |= OVERRIDES.get(model_class.__name__, {})
    default = config_class(**special.pop("default", {}))
    labels = 2 if "QuestionAnswering" in model_class.__name__ else CLASSES
    settings = {
        **_ALWAYS,
        "num_labels": labels,
        **_Shrinking(special).settings(default),
    }
    return config_class(**settings)


class _Shrinking:
    """Shrinks one configuration and those within it, with shared token ids."""

    def __init__(self, special: Mapping[str, Any]) -> None:
        self._special = special
        self._ids: dict[str, int] = {}

    def settings(self, config: PreTrainedConfig, path: str = "") -> dict[str, Any]:
        """Return the arguments of the tiny configuration."""
        names = [f.name for f in dataclasses.fields(config) if f.init]
        values = {name: _value(config, name) for name in names}
        found = self._whole(config, values)
        for name, value in values.items():
            if isinstance(value, PreTrainedConfig):
                own = self.settings(value, f"{path}{name}.")
                found[name] = {**own, "model_type": value.model_type}
            elif name not in found and (tiny := self._tiny(name, value)) is not value:
                found[name] = tiny
        found |= OVERRIDES.get(config.model_type, {})
        found |= {
            name.removeprefix(path): value
            for name, value in self._special.items()
            if name.startswith(path)
        }
        return {n: v for n, v in found.items() if "." not in n and n != "default"}

    def _whole(
        self, config: PreTrainedConfig, values: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the settings that depend on several fields."""
        found = self._representatives(config, values)
        heads = values.get("num_attention_heads", values.get("num_heads"))
        if heads and values.get("num_key_value_heads", 0) in (None, heads):
            found["num_key_value_heads"] = SIZES["num_attention_heads"]
        if "head_dim" in values and values["head_dim"] is None:
            found["head_dim"] = SIZES["head_dim"]
        return found

    def _representatives(
        self, config: PreTrainedConfig, values: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the lists with an entry per layer, cut to one layer of each sort."""
        layers = getattr(config, "num_hidden_layers", None) or 0
        per_layer = {
            name: value
            for name, value in values.items()
            if isinstance(value, list | tuple) and len(value) == layers > _MOST_LAYERS
        }
        if not per_layer:
            return {}
        sorts = [str(sort) for sort in zip(*per_layer.values(), strict=True)]
        kept = sorted({sorts.index(sort) for sort in sorts})[:_MOST_LAYERS]
        kept = kept if len(kept) > 1 else [0, 1]
        cut = {name: [value[i] for i in kept] for name, value in per_layer.items()}
        depth = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        return {**cut, depth: len(kept)}

    def _tiny(self, name: str, value: Any) -> Any:
        """Return the value itself where nothing is to be shrunk."""
        if "token_id" in name or "token_index" in name:
            return self._token(name, value)
        if isinstance(value, bool):
            return value
        if isinstance(value, float) or name.endswith(("_prob", "dropout")):
            return self._without_chance(name, value)
        if name in SIZES and isinstance(value, int):
            return self._size(name, value)
        if isinstance(value, dict):
            return {k: _IN_DICTS.get(k, v) for k, v in value.items()}
        return value

    def _size(self, name: str, value: int) -> int:
        if name in ("vocab_size", "vocab_size_per_layer_input"):
            return VOCABULARY
        return min(value, SIZES[name]) if value > 0 else value

    def _without_chance(self, name: str, value: Any) -> Any:
        if value and any(word in name for word in _CHANCES):
            return 0.0
        if name in ("initializer_range", "init_std"):
            return 0.2  # so that attention is not uniform
        return value

    def _token(self, name: str, value: Any) -> Any:
        stem = name.replace("_token_index", "").replace("_token_id", "")
        if stem in _TOKENS:
            return _TOKENS[stem]
        if not isinstance(value, int):
            return value
        if stem not in self._ids:
            self._ids[stem] = _FIRST_SPECIAL + len(self._ids)
        return self._ids[stem]


def _value(config: PreTrainedConfig, name: str) -> Any:
    """Return a field's value, also where it is one of those that vary by layer."""
    held, place = vars(config), config.attribute_map.get(name, name)
    return held[place] if place in held else getattr(config, name, None)
