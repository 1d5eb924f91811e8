"""Images, in each of the layouts that models take."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator

from hf_sketch.recipes.tables.census.media import JOINED, Maker, Media, forward_names

_GRID = 4  # patches along each side, where the model takes patches


def picture_makers(model: Any) -> Iterator[Maker]:
    """Yield makers of one example's image, the likeliest layout first."""
    names = forward_names(model)
    config = model.config
    vision = _vision(config)
    token = _first(config, "image_token_id", "image_token_index", "media_token_id")
    for shapes in _layouts(names, vision):
        yield _maker(shapes, token)


def _maker(shapes: dict[str, Any], token: int | None) -> Maker:
    """Return a maker of random tensors of these shapes; other values are kept."""

    def make(generator: Generator) -> Media:
        inputs = {
            name: torch.randn(shape, generator=generator)
            if isinstance(shape, tuple)
            else shape
            for name, shape in shapes.items()
        }
        return Media(inputs, token, "get_image_features")

    return make


def _layouts(names: set[str], vision: Any) -> Iterator[dict[str, Any]]:
    """Yield the names and shapes of each layout that the names allow."""
    patch = _number(vision, "patch_size", default=4)
    channels = _number(vision, "num_channels", "in_channels", "in_chans", default=3)
    square = channels * patch * patch
    if "image_grid_thw" in names:
        frames = _number(vision, "temporal_patch_size", "patch_temporal", default=1)
        yield from _grids(names, channels, frames, patch)
    if "flattened_patches" in names:
        yield {"flattened_patches": (_GRID**2, square + 2)}
    if "spatial_shapes" in names:
        yield {
            "pixel_values": (_GRID**2, square),
            "spatial_shapes": torch.tensor([_GRID, _GRID]),
            "pixel_attention_mask": torch.ones(_GRID**2).long(),
        }
    if "pixel_values" in names:
        yield from _images(names, channels, *_size(vision))


def _grids(
    names: set[str], channels: int, frames: int, patch: int
) -> Iterator[dict[str, Any]]:
    """Yield layouts in which the patches of all images lie end to end."""
    count, square = _GRID**2, channels * patch * patch
    grid = {f"{JOINED}image_grid_thw": torch.tensor([[1, _GRID, _GRID]])}
    if "image_merge_sizes" in names:
        grid[f"{JOINED}image_merge_sizes"] = torch.tensor([1])
    pixels = f"{JOINED}pixel_values"
    yield {pixels: (count, square * frames), **grid}
    yield {pixels: (count, square), **grid}
    yield {pixels: (count, channels, patch, patch), **grid}
    yield {pixels: (count, channels, frames, patch, patch), **grid}


def _images(
    names: set[str], channels: int, height: int, width: int
) -> Iterator[dict[str, Any]]:
    """Yield layouts in which an example has whole images."""
    image = (channels, height, width)
    sizes = torch.tensor([height, width])
    if "image_sizes" in names:
        yield {"pixel_values": (2, *image), "image_sizes": sizes}
        yield {"pixel_values": image, "image_sizes": sizes}
    if "aspect_ratio_ids" in names:
        yield {
            "pixel_values": (1, 4, *image),
            "aspect_ratio_ids": torch.tensor([1]),
            "aspect_ratio_mask": torch.tensor([[1, 0, 0, 0]]),
        }
    if "high_res_pixel_values" in names:
        yield {"pixel_values": image, "high_res_pixel_values": image}
    mask = torch.ones(1, height, width).long()
    yield {"pixel_values": image}
    yield {"pixel_values": (1, *image), "pixel_attention_mask": mask}
    yield {"pixel_values": (1, *image)}
    yield {"pixel_values": (2, *image)}


def _vision(config: Any) -> Any:
    for name in ("vision_config", "vq_config", "encoder", "img_processor"):
        if (found := getattr(config, name, None)) is not None:
            return found
    return config


def _size(vision: Any) -> tuple[int, int]:
    size = getattr(vision, "image_size", None) or 32
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


def _first(config: Any, *names: str) -> int | None:
    """Return the first of these that the configuration has."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def _number(config: Any, *names: str, default: int) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple):
            value = value[-1]
        if isinstance(value, int):
            return value
    return default
