"""Prompts of the training set, and of the rows that a model was called with."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_IGNORED = -100


class Prompts:
    """Compares prompts as text, as a tokenizer writes them.

    Args:
        processing_class: the Trainer's tokenizer, or a processor that holds one.
    """

    def __init__(self, processing_class: Any) -> None:
        self._tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)

    def of_item(self, item: Any) -> str | None:
        """Return the prompt of an item of the dataset; None if it has none."""
        prompt = item.get("prompt") if isinstance(item, Mapping) else None
        if self._tokenizer is None or not prompt:
            return None
        if not isinstance(prompt, str):
            prompt = self._tokenizer.apply_chat_template(
                prompt, tokenize=False, add_generation_prompt=True
            )
        return self._plain(self._tokenizer(prompt, add_special_tokens=False).input_ids)

    def of_rows(self, inputs: Mapping[str, Any], main_input: str) -> list[str] | None:
        """Return each row's prompt; None if it is not known where the prompts end."""
        tokens, labels = inputs.get(main_input), inputs.get("labels")
        scored = inputs.get("logits_to_keep")
        if not isinstance(tokens, Tensor) or tokens.dim() != 2:
            return None
        if self._tokenizer is None:
            return None
        places = tokens.new_ones(tokens.shape).cumsum(1) - 1
        if isinstance(labels, Tensor) and labels.shape == tokens.shape:
            answered = labels != _IGNORED
            ends = answered.int().argmax(1).where(answered.any(1), tokens.shape[1])
        elif isinstance(scored, int) and scored > 1:
            # The scores of a token are those of the place before it.
            ends = tokens.new_full((len(tokens),), tokens.shape[1] - scored + 1)
        else:
            return None
        kept = places < ends.unsqueeze(1)
        if isinstance(mask := inputs.get("attention_mask"), Tensor):
            kept &= mask != 0
        rows = zip(tokens, kept, strict=True)
        return [self._plain(row[own].tolist()) for row, own in rows]

    def _plain(self, tokens: list[int]) -> str:
        """Return text of tokens without special ones and without spaces."""
        return "".join(self._tokenizer.decode(tokens, skip_special_tokens=True).split())
