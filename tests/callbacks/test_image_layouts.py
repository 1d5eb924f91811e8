"""Rows where images are cut into tiles, padded to a size, or stacked by example."""

import pytest
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tests.helpers.own_gradients import assert_rows_are_own, resting_trainer
from tests.helpers.tiers import full

IMAGE, BETWEEN, VOCABULARY, SIDE = 100, 98, 110, 16
_LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_TEXT = {**_LAYERS, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 8}
_TEXT |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "model_type": "llama"}
_PATCHES = {**_LAYERS, "num_hidden_layers": 2, "image_size": SIDE, "patch_size": 4}
_SIGLIP = {**_PATCHES, "model_type": "siglip_vision_model"}
_PIXTRAL = {**_PATCHES, "model_type": "pixtral", "head_dim": 8}
_GRIDS = {"image_grid_pinpoints": [[16, 16], [16, 32], [32, 16], [32, 32]]}
_LAST = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
_SCALED = {"vision_config": {**_SIGLIP, "hidden_act": "gelu"}, "scale_factor": 2}
SIZED, TILED, STACKED, ALIKE = "sized", "tiled", "stacked", "alike"
KINDS = {
    "pixtral": (SIZED, "llava", {"vision_config": _PIXTRAL, **_LAST}),
    "mistral3": (SIZED, "mistral3", {"vision_config": _PIXTRAL, **_LAST}),
    "llava_next": (
        TILED,
        "llava_next",
        {"vision_config": _SIGLIP, **_GRIDS, **_LAST},
    ),
    "llava_onevision": (
        TILED,
        "llava_onevision",
        {"vision_config": _SIGLIP, **_GRIDS, **_LAST},
    ),
    "idefics3": (STACKED, "idefics3", _SCALED),
    "smolvlm": (STACKED, "smolvlm", _SCALED),
    "gemma3": (
        ALIKE,
        "gemma3",
        {"vision_config": _SIGLIP, "mm_tokens_per_image": 4},
    ),
}
# One image of each size in a first batch, as many as examples in another one.
WIDE, HIGH, LARGE, WHOLE = (8, 16), (16, 8), (16, 24), (16, 16)
ONE_EACH_AT_FIRST = [[WIDE], [LARGE], [WHOLE], [WIDE] * 2, [], [WHOLE]]
ONE_EACH_AT_FIRST += [[LARGE, WIDE], [HIGH], []]
TILES_ALIKE_AT_FIRST = [[(10, 32)], [(16, 32)], [(6, 32)]]  # three each
TILES_ALIKE_AT_FIRST += [[WHOLE], [(10, 32)], [(32, 32)]]  # two, three and five
TILES_ALIKE_AT_FIRST += [[WHOLE] * 2, [], [(32, 32)]]
AS_MANY_AT_FIRST = [[WHOLE] * 2, [], [WHOLE], [], [WHOLE], [WHOLE] * 2]
AS_MANY_AT_FIRST += [[WHOLE], [WHOLE], [WHOLE]]


def vision_model(kind):
    torch.manual_seed(0)
    _, name, settings = KINDS[kind]
    text = {**_TEXT, "model_type": "gemma3_text"} if kind == "gemma3" else _TEXT
    if kind == "llava_onevision":
        text = {**_TEXT, "model_type": "qwen2"}
    config = AutoConfig.for_model(
        name,
        text_config=text,
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        **settings,
    )
    return AutoModelForImageTextToText.from_config(config)


def image_inputs(kind, model, images, most):
    """What a model takes of examples' images, each (tiles, 3, height, width)."""
    layout = KINDS[kind][0]
    flat = [image for own in images for image in own]
    pixels = [image.pixels for image in flat]
    if layout == ALIKE:
        return {"pixel_values": torch.cat(pixels)}
    if layout == STACKED:
        stacked = torch.zeros(len(images), most, 3, SIDE, SIDE)
        for row, own in zip(stacked, images, strict=True):
            for place, image in enumerate(own):
                row[place] = image.pixels[0]
        return {"pixel_values": stacked, "pixel_attention_mask": masked(stacked)}
    inputs = {"image_sizes": torch.tensor([image.size for image in flat])}
    if layout == SIZED:
        height, width = inputs["image_sizes"].max(0).values.tolist()
        padded = [
            pad(x[0], (0, width - x.shape[3], 0, height - x.shape[2])) for x in pixels
        ]
        return {**inputs, "pixel_values": torch.stack(padded)}
    if kind == "llava_onevision":
        inputs["batch_num_images"] = torch.tensor([len(own) for own in images])
    return {**inputs, "pixel_values": pad_sequence(pixels, batch_first=True)}


def masked(stacked):
    return (
        stacked.any(2)
        .any(-1, keepdim=True)
        .any(-2, keepdim=True)
        .long()
        .expand(*stacked.shape[:2], SIDE, SIDE)
    )


class Image:
    def __init__(self, kind, model, size, alone, generator):
        layout, tiles, self.size = KINDS[kind][0], 1, size
        height, width = size if layout == SIZED else (SIDE, SIDE)
        if layout == TILED and (alone or kind == "llava_next"):
            grids = model.config.image_grid_pinpoints
            tiles = image_size_to_num_patches([*size], grids, SIDE)
        self.pixels = torch.randn(tiles, 3, height, width, generator=generator)


def count_of(kind, model, own):
    """How many tokens stand for each image of an example."""
    inputs = image_inputs(kind, model, [own], len(own))
    with torch.no_grad():
        found = model.model.get_image_features(**inputs).pooler_output
    return [x.flatten(0, -2).shape[0] for x in found]


def examples_with(kind, model, images, between):
    """Texts that begin with their images."""
    examples = []
    for index, sizes in enumerate(images):
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(3, 97, (6 + index % 3,), generator=generator)
        own = [Image(kind, model, size, len(sizes) == 1, generator) for size in sizes]
        tokens = []
        for count in count_of(kind, model, own) if own else []:
            tokens += [*[IMAGE] * count, *between]
        tokens = torch.tensor([*tokens, *words.tolist()])
        examples.append({"tokens": tokens, "images": own})
    return examples


def collator_of(kind, model):
    def collate(examples):
        tokens = [example["tokens"] for example in examples]
        ids = pad_sequence(tokens, batch_first=True)
        batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
        batch["labels"] = ids.masked_fill((ids > 96) | (ids == 0), -100)
        if kind == "gemma3":
            batch["token_type_ids"] = (ids == IMAGE).long()
        images = [example["images"] for example in examples]
        if most := max(map(len, images)):
            batch |= image_inputs(kind, model, images, most)
        return batch

    return collate


@pytest.mark.parametrize(
    ("kind", "images", "between"),
    [
        ("pixtral", ONE_EACH_AT_FIRST, [BETWEEN]),
        ("llava_next", TILES_ALIKE_AT_FIRST, [BETWEEN]),
        ("llava_onevision", AS_MANY_AT_FIRST, [BETWEEN]),
        ("idefics3", AS_MANY_AT_FIRST, [BETWEEN]),
        *full(
            ("mistral3", ONE_EACH_AT_FIRST, [BETWEEN]),
            ("llava_next", ONE_EACH_AT_FIRST, []),  # of whom the images are is unknown
            ("llava_next", AS_MANY_AT_FIRST, [BETWEEN]),
            ("llava_onevision", TILES_ALIKE_AT_FIRST, []),
            ("smolvlm", AS_MANY_AT_FIRST, [BETWEEN]),
            ("gemma3", AS_MANY_AT_FIRST, [BETWEEN]),
        ),
    ],
)
def test_examples_may_have_images_of_any_number_and_size(
    tmp_path, kind, images, between
):
    model = vision_model(kind)
    trainer = resting_trainer(
        tmp_path,
        model,
        examples_with(kind, model, images, between),
        collator_of(kind, model),
    )
    trainer.train()
    store = assert_rows_are_own(trainer)
    assert store.measured_error.row_error < 1e-4
