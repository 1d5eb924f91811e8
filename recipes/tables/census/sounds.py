"""Sounds, as samples or as features by time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator

from hf_sketch.recipes.tables.census.media import Maker, Media, forward_names

_SAMPLES = 400
_MANY_SAMPLES = 2560
_FRAMES = 64
_PARTS = ("audio_config", "encoder_config", "encoder")
_WIDTHS = (
    "num_mel_bins",
    "input_feat_per_channel",
    "feature_projection_input_dim",
    "feature_size",
    "input_dim",
    "d_model",
    "hidden_size",
)
_MASKS = {"feature_attention_mask", "padding_mask", "input_features_mask"}


def sound_makers(model: Any) -> Iterator[Maker]:
    """Yield makers of one example's sound, the likeliest layout first."""
    names = forward_names(model)
    token = getattr(model.config, "audio_token_id", None)
    if token is None:
        token = getattr(model.config, "audio_token_index", None)
    for name, shape, frames in _layouts(names, model.config):
        yield _maker(names, name, shape, frames, token)


def _maker(
    names: set[str], name: str, shape: tuple[int, ...], frames: int, token: Any
) -> Maker:
    """Return a maker of random sounds of a shape, with the masks that go with it."""

    def make(generator: Generator) -> Media:
        inputs = {name: torch.randn(shape, generator=generator)}
        for mask in _MASKS & names:
            inputs[mask] = torch.ones(frames).bool()
        if name == "input_features" and "input_ids" not in names:
            inputs["attention_mask"] = torch.ones(frames).long()
        return Media(inputs, token, "get_audio_features")

    return make


def _layouts(
    names: set[str], config: Any
) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Yield the name, the shape and the number of frames of each layout."""
    parts = (getattr(config, name, None) for name in _PARTS)
    audio = next((part for part in parts if part is not None), config)
    widths = (getattr(audio, name, None) for name in _WIDTHS)
    width = next((w for w in widths if isinstance(w, int)), 8)
    if "input_features" in names:
        frames = 2 * (getattr(audio, "max_source_positions", None) or _FRAMES // 2)
        yield "input_features", (width, frames), frames
        yield "input_features", (_FRAMES, width), _FRAMES
        yield "input_features", (width, _FRAMES), _FRAMES
        yield "input_features", (_FRAMES, 4 * width), _FRAMES
    if "input_values" in names:
        yield "input_values", (_SAMPLES,), _SAMPLES
        yield "input_values", (_MANY_SAMPLES,), _MANY_SAMPLES
        yield "input_values", (1, _MANY_SAMPLES), _MANY_SAMPLES
        yield "input_values", (_FRAMES, width), _FRAMES
