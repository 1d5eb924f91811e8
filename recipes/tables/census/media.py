"""Images and sounds within a text: their inputs, and the tokens in their place."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves

JOINED = "joined:"  # inputs that lie end to end in a batch, not stacked


@dataclass(frozen=True)
class Media:
    """One example's image or sound.

    Args:
        inputs: inputs by name; names that start with `JOINED` lie end to end in a
            batch.
        token: stands in the text for one feature; None if the text has none.
        features: the model's method that computes the features.
    """

    inputs: dict[str, Tensor]
    token: int | None
    features: str


Maker = Callable[[Generator], Media]


def forward_names(model: Any) -> set[str]:
    """Return the names of what the model's forward pass takes."""
    parameters = inspect.signature(model.forward).parameters
    passed_on = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    return {*parameters, *(["labels"] if passed_on else [])}


def placed(
    model: Any, media: Media, example: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the example with the image or sound before its text."""
    count = 0 if media.token is None else feature_count(model, media, example)
    token = media.token or 0
    found = {**example, **media.inputs}
    before = {"input_ids": token, "attention_mask": 1, "labels": -100}
    before |= {"token_type_ids": 0}
    for name, value in before.items():
        if name in example and example[name].shape == example["input_ids"].shape:
            found[name] = torch.cat([torch.full((count,), value), example[name]])
    if "mm_token_type_ids" in forward_names(model):
        found["mm_token_type_ids"] = (found["input_ids"] == token).long()
    return found


def feature_count(model: Any, media: Media, example: Mapping[str, Tensor]) -> int:
    """Return how many features the model makes of one example's image or sound."""
    owner = model if hasattr(model, media.features) else model.base_model
    method = getattr(owner, media.features, None)
    if method is None:  # one token stands for the whole image or sound
        return 1
    parameters = inspect.signature(method).parameters
    passed_on = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    taken = {*parameters, *(media.inputs if passed_on else [])}
    batch = {
        name.removeprefix(JOINED): value if name.startswith(JOINED) else value[None]
        for name, value in {**example, **media.inputs}.items()
        if name in taken or name.removeprefix(JOINED) in taken
    }
    with torch.no_grad():
        found = method(**batch)
    pooled = getattr(found, "pooler_output", None)
    if pooled is None:
        pooled = getattr(found, "last_hidden_state", found)
    leaves = [x for x in tree_leaves(pooled) if isinstance(x, Tensor)]
    return sum(x.numel() // x.shape[-1] for x in leaves)
