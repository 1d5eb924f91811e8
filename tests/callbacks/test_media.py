"""Rows of models that take images and sounds, of which examples have unequally many."""

import random

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCTC, AutoModelForImageTextToText

from hf_sketch import ExampleSketcher, ModelSketch
from tests.helpers.own_gradients import SIZE, assert_rows_are_own, resting_trainer
from tests.helpers.tiers import full

IMAGE, VOCABULARY = 100, 110
LARGE, SMALL = (8, 4), (4, 4)  # in patches
ONE = [SMALL]
# The images of nine examples, in batches of three; of twelve in batches of four.
ONE_EACH_AT_FIRST = [ONE] * 3 + [[], ONE, ONE * 2, [LARGE], ONE, []]
TWO_EACH_LATER = [ONE] * 3 + [ONE * 2] * 3 + [ONE, ONE * 3, ONE * 2]
OF_SEVERAL_SIZES = [ONE] * 3 + [[LARGE], ONE, [(8, 8)], ONE * 2, [LARGE], []]
AS_MANY_AS_EXAMPLES = [ONE] * 4 + [ONE * 2] * 4 + [ONE, ONE, [], ONE * 2]
NONE_AT_FIRST = [[], ONE, ONE * 2, ONE, ONE, ONE, [LARGE], ONE, []]
_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
_TEXT |= {"vocab_size": VOCABULARY, "eos_token_id": 1, "bos_token_id": 1}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
_PATCHES = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
_PATCHES |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
VISION = {
    "qwen2_vl": {**_PATCHES, "embed_dim": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {
        **_PATCHES,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    },
    "llava": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 8,
        "patch_size": 4,
        "projection_dim": 32,
    },
}


def vision_model(kind):
    torch.manual_seed(0)
    text = {**_TEXT, "rope_parameters": _ROPE}
    tokens = {"image_token_id": IMAGE, "video_token_id": 101}
    tokens |= {"vision_start_token_id": 102, "vision_end_token_id": 103}
    if kind == "llava":
        text = {**_TEXT, "model_type": "llama"}
        tokens = {"image_token_index": IMAGE, "vision_feature_layer": -1}
    config = AutoConfig.for_model(
        kind, text_config=text, vision_config=VISION[kind], **tokens
    )
    return AutoModelForImageTextToText.from_config(config)


def examples_with(images, kind):
    """Texts that begin with their images."""
    examples = []
    for index, sizes in enumerate(images):
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(3, 97, (6 + index % 3,), generator=generator)
        tokens, pixels = [], []
        for height, width in sizes:
            shape = (1, 3, 8, 8) if kind == "llava" else (height * width, 96)
            pixels.append(torch.randn(*shape, generator=generator))
            tokens += [102, *[IMAGE] * (height * width // 4), 103]
        tokens = torch.tensor([*tokens, *words.tolist()])
        grids = [[1, *size] for size in sizes]
        examples.append({"tokens": tokens, "pixels": pixels, "grids": grids})
    return examples


def collator_of(kind):
    def collate(examples):
        tokens = [example["tokens"] for example in examples]
        ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        batch = {"input_ids": ids, "attention_mask": (ids > 0).long()}
        batch["labels"] = ids.masked_fill((ids > 96) | (ids == 0), -100)
        pixels = [part for example in examples for part in example["pixels"]]
        grids = [grid for example in examples for grid in example["grids"]]
        if pixels:
            batch["pixel_values"] = torch.cat(pixels)
        if kind != "llava":
            batch["mm_token_type_ids"] = (ids == IMAGE).long()
            batch |= {"image_grid_thw": torch.tensor(grids)} if grids else {}
        return batch

    return collate


@pytest.mark.parametrize(
    ("kind", "images"),
    [
        ("qwen2_vl", ONE_EACH_AT_FIRST),
        ("llava", AS_MANY_AS_EXAMPLES),
        *full(
            ("qwen2_vl", TWO_EACH_LATER),
            ("qwen2_vl", OF_SEVERAL_SIZES),
            ("qwen2_vl", NONE_AT_FIRST),
            ("qwen2_5_vl", ONE_EACH_AT_FIRST),
            ("qwen2_5_vl", OF_SEVERAL_SIZES),
            ("llava", ONE_EACH_AT_FIRST),
            ("llava", TWO_EACH_LATER),
            ("llava", NONE_AT_FIRST),
        ),
    ],
)
def test_examples_may_have_any_number_of_images(tmp_path, kind, images):
    if kind == "llava":  # whose images are of one size
        images = [[SMALL] * len(sizes) for sizes in images]
    trainer = resting_trainer(
        tmp_path,
        vision_model(kind),
        examples_with(images, kind),
        collator_of(kind),
        per_device_train_batch_size=4 if len(images) == 12 else 3,
    )
    trainer.train()
    store = assert_rows_are_own(trainer)
    assert store.measured_error.row_error < 1e-4


def speech_model(**config):
    torch.manual_seed(0)
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "conv_dim": [16, 16],
        "conv_stride": [4, 2],
        "conv_kernel": [8, 4],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "vocab_size": 20,
        "pad_token_id": 0,
        "mask_time_prob": 0.0,
        "layerdrop": 0.0,
    }
    drops = ("hidden_dropout", "activation_dropout", "attention_dropout")
    drops += ("feat_proj_dropout", "final_dropout")
    settings |= dict.fromkeys(drops, 0.0) | config
    return AutoModelForCTC.from_config(AutoConfig.for_model("wav2vec2", **settings))


def sound(index, longest=480):
    """An example of its own length, with a text of its own length."""
    generator = torch.Generator().manual_seed(index)
    length, letters = 240 + 30 * (index % 8), 2 + index % 4
    values, labels = torch.zeros(longest), torch.full((6,), -100)
    values[:length] = torch.randn(length, generator=generator)
    labels[:letters] = torch.randint(1, 20, (letters,), generator=generator)
    mask = (torch.arange(longest) < length).long()
    return {"input_values": values, "attention_mask": mask, "labels": labels}


@pytest.mark.filterwarnings("ignore:The loss is computed outside")
@pytest.mark.parametrize("reduction", ["sum", *full("mean")])
def test_losses_over_alignments_are_those_of_their_examples(tmp_path, reduction):
    sounds = [{k: v.tolist() for k, v in sound(i).items()} for i in range(9)]
    model = speech_model(ctc_loss_reduction=reduction)
    trainer = resting_trainer(tmp_path, model, sounds)
    trainer.train()
    assert_rows_are_own(trainer)


def losses_of(model, batch):
    """Each example's CTC loss, and the numbers that were drawn meanwhile."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits, batch["labels"]
    lengths = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1))
    return functional.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        labels[labels >= 0],
        lengths,
        (labels >= 0).sum(1),
        reduction="none",
    )


def test_modules_that_draw_from_numpy_draw_the_same_when_they_run_again():
    """Wav2Vec2 masks times at random, with a parameter that only they see."""
    model = speech_model(mask_time_prob=0.3, mask_time_length=2).train()
    sounds = [sound(index) for index in range(3)]
    batch = {name: torch.stack([x[name] for x in sounds]) for name in sounds[0]}
    sketch = ModelSketch.from_model(model, SIZE)
    np.random.seed(1)
    random.seed(1)
    with ExampleSketcher(model, sketch) as sketcher:
        model(**batch).loss.backward()
        rows = sketcher.take().rows
    after = np.random.rand(), random.random()
    masked = "wav2vec2.masked_spec_embed"
    assert dict(model.named_parameters())[masked].grad.any()
    for index, row in enumerate(rows):
        np.random.seed(1)
        random.seed(1)
        model.zero_grad()
        losses_of(model, batch)[index].backward()
        own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        expected = sketch.sketch(own)
        assert (row - expected).norm() < 1e-4 * expected.norm()
    assert (np.random.rand(), random.random()) == after
