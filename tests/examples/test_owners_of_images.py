"""Whose the images of a batch are: by the tokens in whose places a model puts them."""

import torch

from hf_sketch.examples.media import media_of
from hf_sketch.examples.split import Runs, Uneven, split_of

IMAGE = {"image": 9}


def starts_of(inputs, tokens, name="pixel_values"):
    return dict(media_of(inputs, torch.tensor(tokens), IMAGE).starts).get(name)


def test_rows_of_images_are_found_by_the_tokens_in_their_place():
    ids = torch.tensor([[5, 6, 7, 8], [9, 9, 5, 6], [9, 9, 9, 9]])
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.zeros(24, 8),
        "image_grid_thw": torch.tensor([[1, 4, 2], [1, 2, 2], [1, 6, 2]]),
    }
    split = split_of(inputs, "input_ids", {"image": 9, "video": 10})
    assert dict(split.media.starts) == {
        "pixel_values": (0, 0, 8, 24),
        "image_grid_thw": (0, 0, 1, 3),
        "": (0, 0, 2, 6),
    }
    assert split.share("pixel_values", inputs["pixel_values"], 0) is None
    assert len(split.share("image_grid_thw", inputs["image_grid_thw"], 2)) == 2
    assert split.within(torch.zeros(24, 3)) is None  # twice as many as tokens
    assert split.within(torch.zeros(6, 3)) == Uneven(3, (0, 0, 2, 6))
    assert split.within(torch.zeros(12, 3)) == Runs(3)  # of tokens
    assert split.within(torch.zeros(9, 3)) is None  # of who knows what
    assert dict(split.some(1, 2).media.starts)["pixel_values"] == (0, 8, 24)
    # As many patches as tokens: whose a row is remains open.
    inputs["input_ids"] = ids.repeat(1, 2)
    assert split_of(inputs, "input_ids", IMAGE).within(torch.zeros(24, 3)) is None


def test_images_of_several_sizes_are_separated_by_what_lies_between_their_tokens():
    tokens = [[9, 9, 5, 9, 9], [5, 5, 5, 5, 5], [9, 9, 9, 9, 5]]
    sizes = torch.tensor([[2, 7], [2, 9], [7, 7]])
    inputs = {"pixel_values": torch.ones(3, 3, 8, 8), "image_sizes": sizes}
    assert starts_of(inputs, tokens) == (0, 2, 2, 3)
    # In proportion, it would be three images in the place of two.
    tokens = [[9, 9, 9, 5, 9], [9, 9, 5, 5, 5], [9, 9, 5, 5, 5]]
    inputs = {"pixel_values": torch.ones(4, 3, 8, 8)}
    assert starts_of(inputs, tokens) == (0, 2, 3, 4)


def test_images_whose_tokens_are_interrupted_are_separated_by_their_areas():
    """Pixtral puts a token at the end of each row of patches."""
    tokens = [[9, 9, 5, 9, 9, 5, 9, 5], [9, 9, 9, 5, 9, 9, 9, 5], [5] * 8]
    sizes = torch.tensor([[8, 8], [4, 4], [8, 12]])
    inputs = {"pixel_values": torch.ones(3, 3, 8, 12), "image_sizes": sizes}
    assert starts_of(inputs, tokens) == (0, 2, 3, 3)


def test_numbers_of_images_that_a_batch_holds_are_believed():
    tokens = [[9, 9, 9, 9, 9, 9], [9, 9, 9, 5, 5, 5], [5, 5, 5, 5, 5, 5]]
    inputs = {
        "pixel_values": torch.ones(4, 3, 8, 8),
        "batch_num_images": torch.tensor([3, 1, 0]),
    }
    assert starts_of(inputs, tokens) == (0, 3, 4, 4)
    inputs["batch_num_images"] = torch.tensor([2, 1, 1])  # of something else
    assert starts_of(inputs, tokens) is None


def test_no_two_batches_are_alike_if_it_is_not_known_whose_an_image_is():
    tokens = torch.tensor([[9, 9, 9], [9, 9, 5], [9, 9, 5]])
    inputs = {"input_ids": tokens, "pixel_values": torch.ones(4, 3, 8, 8)}
    inputs["image_sizes"] = torch.tensor([[8, 8], [5, 8], [8, 8], [8, 8]])
    split = split_of(inputs, "input_ids", IMAGE)
    assert split.media.unknown == {"pixel_values", "image_sizes"}
    assert split.of_input("pixel_values", inputs["pixel_values"]) is None
    assert split.kind != split_of(inputs, "input_ids", IMAGE).kind


def test_tiles_are_those_of_their_images_without_padding():
    tokens = [[9, 9, 5, 9], [5, 5, 5, 5], [9, 9, 9, 5]]
    pixels = torch.ones(3, 4, 3, 2, 2)
    pixels[0, 2:], pixels[1, 1:] = 0, 0
    media = media_of({"pixel_values": pixels}, torch.tensor(tokens), IMAGE)
    assert dict(media.starts)["pixel_values"] == (0, 2, 2, 3)
    assert dict(media.starts)["tiles of pixel_values"] == (0, 3, 3, 7)


def test_images_that_are_stacked_by_example_have_a_row_each():
    tokens = torch.tensor([[5, 6, 7, 9], [9, 9, 5, 6], [4, 5, 6, 5]])
    pixels = torch.ones(3, 2, 3, 4, 4)
    pixels[0, 1], pixels[2] = 0, 0
    inputs = {"input_ids": tokens, "pixel_values": pixels}
    inputs["pixel_attention_mask"] = torch.ones(3, 2, 4, 4)
    split = split_of(inputs, "input_ids", IMAGE)
    found = dict(split.media.starts)
    assert found["pixel_values"] == found["pixel_attention_mask"] == (0, 1, 2, 3)
    assert found["tiles of pixel_values"] == (0, 1, 3, 3)
    assert split.share("pixel_values", pixels, 2) is None  # it has no image
    assert len(split.share("pixel_values", pixels, 1, 2)) == 2


def test_rules_depend_on_what_has_as_many_rows_as_there_are_examples():
    """Then rows of images look like rows of examples."""
    one_each = media_of(
        {"pixel_values": torch.ones(3, 3, 8, 8)},
        torch.tensor([[9, 9, 5], [9, 5, 5], [9, 5, 5]]),
        IMAGE,
    )
    as_many = media_of(
        {"pixel_values": torch.ones(3, 3, 8, 8)},
        torch.tensor([[9, 5, 9], [9, 5, 5], [5, 5, 5]]),
        IMAGE,
    )
    fewer = media_of(
        {"pixel_values": torch.ones(2, 3, 8, 8)},
        torch.tensor([[9, 5, 9], [5, 5, 5], [5, 5, 5]]),
        IMAGE,
    )
    assert len({one_each.kind, as_many.kind, fewer.kind}) == 3


def test_batches_with_equally_many_images_per_example_are_as_any_other():
    tokens = torch.tensor([[9, 9, 5], [9, 9, 6]])
    assert not media_of({"pixel_values": torch.ones(4, 8)}, tokens, IMAGE)
