"""Models as shapes alone: a configuration on torch's meta device."""

from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import (
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
    """
    path = Path(name)
    return AutoConfig.from_pretrained(str(path.parent if path.is_file() else name))


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
