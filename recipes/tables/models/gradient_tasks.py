"""Tasks whose per-example gradients sketches are measured on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
)

from hf_sketch.recipes.tables.models.exact_products import exact_products, gradients
from hf_sketch.recipes.tables.models.gradients import (
    BATCH_SIZE,
    fine_tune,
    fine_tuned_minilm,
)
from hf_sketch.recipes.texts.data_files import check_columns, read_data_file
from hf_sketch.recipes.texts.entailment import check_files, load_pairs, tokenize
from hf_sketch.recipes.texts.minilm import embedded_model_path
from hf_sketch.recipes.texts.text_rows import with_padding

_PREMISES_PER_PASSAGE = 5
_LEAST_WORDS = 20  # what has fewer is a heading
_HELD_BYTES = 3 * 2**29

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class GradientTask:
    """A fine-tuned model, and examples that it was not trained on.

    Args:
        model: the model, in evaluation mode, every parameter trainable.
        examples: the model's inputs for each example, with labels: batches of one.
        optimizer: the one that fine-tuned it, if it is of use.
    """

    model: nn.Module
    examples: Sequence[Batch]
    optimizer: torch.optim.AdamW | None = None

    @property
    def elements(self) -> int:
        """Number of elements of a gradient."""
        return sum(p.numel() for p in self.model.parameters())

    def exact_products(self) -> Tensor:
        """Return inner products of each gradient with each: (n, n), float64.

        At most 1.5 GiB of gradients are held; all are computed again for each such
        part.
        """
        held = max(1, _HELD_BYTES // (4 * self.elements))
        parts: list[Tensor] = []
        for low in range(0, len(self.examples), held):
            some = self.examples[low : low + held]
            found = exact_products(self.model, self.examples, some, _alone)
            parts += [part.double() for part in found.values()]
        return torch.cat(parts)

    def gradients(self, at_once: int) -> Iterator[dict[str, Tensor]]:
        """Yield the gradients of a few examples at a time, by parameter.

        Shapes:
            yields name -> (at most at_once, elements of the parameter), views
        """
        named = dict(self.model.named_parameters())
        sizes = [p.numel() for p in named.values()]
        for low in range(0, len(self.examples), at_once):
            some = self.examples[low : low + at_once]
            found = gradients(self.model, list(named.values()), some, _alone)
            rows = torch.stack(list(found))
            yield dict(zip(named, rows.split(sizes, 1), strict=True))


def snli_task(
    examples: int,
    steps: int,
    train_file: str | None = None,
    validation_file: str | None = None,
) -> GradientTask:
    """Classification: MiniLM on pairs of SNLI, or our own, and validation pairs.

    Args:
        examples: validation pairs to compare.
        steps: AdamW steps beforehand, of 16 training pairs each.
        train_file: premise, hypothesis, label; by default our own pairs.
        validation_file: the same for `examples`; goes with `train_file`.

    Raises:
        ValueError: one of the two files is given without the other.
    """
    check_files(train_file, validation_file)
    model = fine_tuned_minilm(steps, 0, train_file)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    pairs = load_pairs("validation", validation_file).select(range(examples))
    data = tokenize(pairs, tokenizer)
    return GradientTask(
        model,
        [
            {
                **{n: torch.tensor([row[n]]) for n in ("input_ids", "attention_mask")},
                "labels": torch.tensor([row["label"]]),
            }
            for row in data.to_list()
        ],
    )


def language_task(
    masked: bool,
    model_path: str | None,
    text_file: str | None,
    max_length: int,
    examples: int,
    steps: int,
    adapt: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> GradientTask:
    """A language model, fine-tuned on passages, and the first few of them left out.

    Args:
        masked: predict masked tokens (15%), not the next one.
        model_path: a folder or a name on the Hub; None stands for MiniLM, which is a
            masked language model.
        text_file: passages of at least 20 words, one per line or in a column text; None
            stands for premises of our own pairs, five to a passage.
        max_length: tokens kept per passage.
        examples: passages to compare.
        steps: AdamW steps beforehand, of 16 passages each.
        adapt: makes what is fine-tuned of the model, such as one with adapters.

    Raises:
        ValueError: no model is given where there is no default, or there are too few
            passages.
    """
    if model_path is None and not masked:
        raise ValueError(
            "The task causal has no model by default. Pass --model_name_or_path."
        )
    path = model_path or embedded_model_path()
    torch.manual_seed(0)
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model: Any = auto.from_pretrained(path)
    tokenizer = with_padding(AutoTokenizer.from_pretrained(path))
    passages = _passages(text_file)
    if len(passages) < examples + BATCH_SIZE:
        raise ValueError(
            f"The texts have {len(passages)} passages of {_LEAST_WORDS} words or more. "
            f"Pass --examples {len(passages) - BATCH_SIZE}, or a longer --text_file."
        )
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=masked, seed=0)

    def batch(texts: list[str]) -> Batch:
        encoded = tokenizer(texts, truncation=True, max_length=max_length)
        return dict(collate([{"input_ids": ids} for ids in encoded["input_ids"]]))

    model = adapt(model)
    batches = _batches(passages[examples:], steps, batch)
    optimizer = fine_tune(model.train(), batches)
    own = [_scored(partial(batch, [text])) for text in passages[:examples]]
    return GradientTask(model.eval(), own, optimizer)


def _scored(draw: Callable[[], Batch]) -> Batch:
    """Draw masks until there is one: without, there is no loss."""
    while not bool(((found := draw())["labels"] >= 0).any()):
        pass
    return found


def _batches(
    passages: list[str], steps: int, batch: Callable[[list[str]], Batch]
) -> Iterator[Batch]:
    """Passages in turn, from the start again when they have run out."""
    for low in range(0, BATCH_SIZE * steps, BATCH_SIZE):
        places = range(low, low + BATCH_SIZE)
        yield batch([passages[place % len(passages)] for place in places])


def _passages(text_file: str | None) -> list[str]:
    """The texts that are long enough."""
    if text_file is None:
        premises = list(dict.fromkeys(load_pairs("train")["premise"][:]))
        lows = range(0, len(premises), _PREMISES_PER_PASSAGE)
        texts = [" ".join(premises[p : p + _PREMISES_PER_PASSAGE]) for p in lows]
    else:
        data = read_data_file(text_file)
        check_columns(data, ("text",), text_file)
        texts = data["text"][:]
    return [text for text in texts if len(text.split()) >= _LEAST_WORDS]


def _alone(examples: list[Batch]) -> Batch:
    """The only one of some batches."""
    (example,) = examples
    return example
