"""Causal language models whose loss never keeps the logits, as fused losses do."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

_IGNORED = -100
_LOGITS_AT_ONCE = 2**26


def leave_out_logits(model: PreTrainedModel) -> None:
    """Make a model return its loss alone, computed again from hidden states.

    Liger's and TRL's losses do the same in kernels of their own. Here the logits of a
    few tokens at a time are formed, and once more in the backward pass.

    Args:
        model: a causal language model, changed in place.
    """
    body: Any = model.base_model
    head: Any = model.get_output_embeddings()

    def forward(
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> ModelOutput:
        hidden = body(input_ids=input_ids, attention_mask=attention_mask)[0][:, :-1]
        wanted = labels[:, 1:]
        each = max(1, _LOGITS_AT_ONCE // (len(labels) * len(head.weight)))
        parts: list[Any] = [
            checkpoint(_loss, x, head.weight, y, use_reentrant=False)
            for x, y in zip(hidden.split(each, 1), wanted.split(each, 1), strict=True)
        ]
        items = num_items_in_batch
        if items is None:
            items = (wanted != _IGNORED).sum()
        return ModelOutput(loss=torch.stack(parts).sum() / items)

    model.forward = forward


def _loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum the cross-entropy of some tokens."""
    logits = functional.linear(hidden, weight).flatten(0, 1).float()
    return functional.cross_entropy(
        logits, labels.flatten(), ignore_index=_IGNORED, reduction="sum"
    )
