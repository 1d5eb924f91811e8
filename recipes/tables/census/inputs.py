"""Tiny examples for every task, and how they are put into a batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Generator, Tensor

from hf_sketch.recipes.tables.census.attempt import Attempt
from hf_sketch.recipes.tables.census.configs import CLASSES, LENGTH
from hf_sketch.recipes.tables.census.media import JOINED, Maker, forward_names, placed
from hf_sketch.recipes.tables.census.pictures import picture_makers
from hf_sketch.recipes.tables.census.sounds import sound_makers

Example = dict[str, Tensor]
Builder = Callable[[int, Generator], Example]
_CHOICES = 4
_WORDS = (3, 90)
_TYPED = {"gemma3", "paligemma"}  # models that ask for token types in training


def examples_for(task: str, model: Any, count: int) -> list[Example]:
    """Return examples that the model takes, of different lengths where it pads.

    Raises:
        Exception: what the model raised at the first way to build them, where it takes
            none.
    """
    failed: list[Attempt] = []
    for build in _builders(task, model):
        with Attempt() as trial:
            examples = [_accepted(model, build(i, _generator(i))) for i in range(count)]
            model(**collate(examples[:2]))
            return examples
        failed.append(trial)
    assert failed[0].error is not None
    raise failed[0].error


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Stack examples, or lay their parts end to end where the name says so."""
    batch: dict[str, Tensor] = {}
    for name in examples[0]:
        join = torch.cat if name.startswith(JOINED) else torch.stack
        batch[name.removeprefix(JOINED)] = join([example[name] for example in examples])
    return batch


def _generator(index: int) -> Generator:
    return torch.Generator().manual_seed(index)


def _builders(task: str, model: Any) -> Iterator[Builder]:
    """Yield ways to build an example, the best first."""
    label = _label(task, model)
    names = forward_names(model)
    media = list(chain(picture_makers(model), sound_makers(model)))
    if task in ("image", "audio", "ctc") or "input_ids" not in names:
        yield from (partial(_alone, make, label) for make in media)
    elif task not in ("choice", "question"):
        yield from (partial(_with_media, model, make, label) for make in media)
    yield _choices if task == "choice" else partial(_text_alone, model, label)


def _label(task: str, model: Any) -> Callable[..., Example]:
    """Return what makes the labels: those of a decoder, if the model has one."""
    label = _LABELS[task]
    if label in (_next_words, _translation):
        names = forward_names(model)
        decodes = getattr(model.config, "is_encoder_decoder", False)
        decodes = decodes or {"decoder_input_ids", "input_ids"} - names == {"input_ids"}
        return _translation if decodes else _next_words
    return label


def _alone(make: Maker, label: Builder, index: int, generator: Generator) -> Example:
    media = make(generator)
    return {**media.inputs, **label(index, generator)}


def _text_alone(
    model: Any, label: Callable[..., Example], index: int, generator: Generator
) -> Example:
    example = {**text(index, generator), **_extras(model, generator)}
    return {**example, **label(index, generator, example)}


def _with_media(
    model: Any,
    make: Maker,
    label: Callable[..., Example],
    index: int,
    generator: Generator,
) -> Example:
    return placed(model, make(generator), _text_alone(model, label, index, generator))


def text(index: int, generator: Generator) -> Example:
    """Token ids, padded on the right, with their mask; three end a sentence."""
    length = 8 + index % 5
    mask = (torch.arange(LENGTH) < length).long()
    ids = torch.randint(*_WORDS, (LENGTH,), generator=generator)
    ids[[2, 5, length - 1]] = 2
    return {"input_ids": ids * mask, "attention_mask": mask}


def _choices(index: int, generator: Generator) -> Example:
    choices = [text(index + k, generator) for k in range(_CHOICES)]
    return {**collate(choices), "labels": torch.tensor(index % _CHOICES)}


def _next_words(index: int, generator: Generator, example: Example) -> Example:
    hidden = example["attention_mask"] == 0
    return {"labels": example["input_ids"].masked_fill(hidden, -100)}


def _some_words(index: int, generator: Generator, example: Example) -> Example:
    shown = torch.rand(LENGTH, generator=generator) < 0.5
    shown[0] = False
    labels = _next_words(index, generator, example)["labels"]
    return {"labels": labels.masked_fill(shown, -100)}


def _translation(index: int, generator: Generator, example: Any = None) -> Example:
    labels = torch.randint(*_WORDS, (LENGTH,), generator=generator)
    labels[3 + index % 4 :] = -100
    return {"labels": labels}


def _letters(index: int, generator: Generator, example: Any = None) -> Example:
    labels = torch.randint(3, 20, (4,), generator=generator)
    labels[2 + index % 3 :] = -100
    return {"labels": labels}


def _class(index: int, generator: Generator, example: Any = None) -> Example:
    return {"labels": torch.tensor(index % CLASSES)}


def _classes(index: int, generator: Generator, example: Example) -> Example:
    labels = torch.randint(0, CLASSES, (LENGTH,), generator=generator)
    return {"labels": labels.masked_fill(example["attention_mask"] == 0, -100)}


def _span(index: int, generator: Generator, example: Any = None) -> Example:
    start = torch.tensor(index % 4)
    return {"start_positions": start, "end_positions": start + 2}


_LABELS: Mapping[str, Callable[..., Example]] = {
    "causal": _next_words,
    "seq2seq": _translation,
    "masked": _some_words,
    "sequence": _class,
    "token": _classes,
    "question": _span,
    "choice": _class,
    "image": _class,
    "audio": _class,
    "ctc": _letters,
    "speech": _translation,
    "image-text": _next_words,
}


def _extras(model: Any, generator: Generator) -> Example:
    """Return what some text models ask for beside the tokens."""
    names = forward_names(model)
    extras: Example = {}
    if "bbox" in names:
        low = torch.randint(0, 30, (LENGTH, 2), generator=generator)
        extras["bbox"] = torch.cat([low, low + 5], 1)
    if "visual_feats" in names:
        width = model.config.visual_feat_dim
        extras["visual_feats"] = torch.randn(5, width, generator=generator)
        extras["visual_pos"] = torch.rand(5, 4, generator=generator)
    if "qformer_input_ids" in names:
        extras["qformer_input_ids"] = torch.randint(*_WORDS, (5,), generator=generator)
        extras["qformer_attention_mask"] = torch.ones(5).long()
    if "image_embeds_position_mask" in names:
        extras["image_embeds_position_mask"] = torch.arange(LENGTH) < 4
    if "image_attention_mask" in names:
        extras["image_attention_mask"] = torch.ones(LENGTH, 1).long()
    if model.config.model_type in _TYPED:
        extras["token_type_ids"] = torch.zeros(LENGTH).long()
    return extras


def _accepted(model: Any, example: Mapping[str, Tensor]) -> Example:
    """Return the inputs that the model's forward pass has a name for."""
    names = forward_names(model)
    return {
        name: value
        for name, value in example.items()
        if name.removeprefix(JOINED) in names
    }
