"""Models as shapes alone: a configuration on torch's meta device."""

import json
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
)


def load_config(name: str) -> PreTrainedConfig:
    """A configuration by its folder, its file, or its name on the Hub.

    Raises:
        OSError: it cannot be found.
        ValueError: the file is no configuration of a model.
    """
    path = Path(name)
    if not path.is_file():
        return AutoConfig.from_pretrained(name)
    content = json.loads(path.read_text())
    kind = content.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{path} must have a model_type that Transformers knows, got {kind!r}: pass"
            " the config.json of a model."
        )
    return CONFIG_MAPPING[kind].from_dict(content)


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The model of a configuration, without memory for its weights.

    Its class is the first of `config.architectures`; without one, the type's causal
    language model, or what the type has.
    """
    named = (config.architectures or [""])[0]
    kind = getattr(transformers, named, None) if named else None
    auto = AutoModel
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        auto = AutoModelForCausalLM
    with torch.device("meta"):
        model = kind(config) if kind else auto.from_config(config)
    return model.to(dtype)
