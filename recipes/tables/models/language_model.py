"""Causal language models with random weights, and a gradient of their loss."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_sketch.recipes.placement import device

_TINY = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "vocab_size": 3000,
}
_TOKENS = 32


def random_language_model(model_type: str, tiny: bool) -> nn.Module:
    """A model of a type's default shape, or of a small one, always the same."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(_TINY if tiny else {}))
    return AutoModelForCausalLM.from_config(config).eval().to(device())


def fill_gradients(model: nn.Module) -> None:
    """Leave the gradient of the loss on random tokens in the parameters' `.grad`."""
    size = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(size, (1, _TOKENS), generator=generator).to(device())
    model(input_ids=tokens, labels=tokens).loss.backward()


def flat_gradient(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The gradients end to end; a parameter that has none counts as zero."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([part.flatten() for part in parts])


def model_gradient(model_type: str, elements: int | None, tiny: bool) -> Tensor:
    """The first elements of the gradient of a whole model; None stands for all.

    Raises:
        ValueError: the model has fewer elements.
    """
    model = random_language_model(model_type, tiny)
    fill_gradients(model)
    gradient = flat_gradient(model.parameters())
    if elements is None:
        return gradient
    if not 1 <= elements <= len(gradient):
        raise ValueError(
            f"elements must be in [1, {len(gradient)}], the size of the {model_type} "
            f"model, got {elements}: pass --elements {len(gradient)} for all of it."
        )
    return gradient[:elements].clone()
