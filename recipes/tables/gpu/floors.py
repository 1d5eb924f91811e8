"""Times beside what reading the same bytes takes at the bandwidth of a copy."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from hf_sketch import ModelSketch
from hf_sketch.attribution.scores import BestRows, QueryMatrix
from hf_sketch.recipes.placement import device
from hf_sketch.recipes.tables.measure import spread, timed
from hf_sketch.recipes.tables.quality.recorded_runs import SHAPES
from hf_sketch.store.blocks import RowBlock
from hf_sketch.store.rows import encode

_SIDE = 2**13  # of the matrices whose product measures the rate of arithmetic
_TOP = 10
_BLOCK_ELEMENTS = 2**26

Figures = dict[str, dict[str, float]]


def ceilings(rounds: int, tiny: bool) -> dict[str, float]:
    """Bytes per second of a copy, read and written, and flops of products."""
    side = _SIDE // 64 if tiny else _SIDE
    matrix = torch.randn(side, side, device=device())
    half = matrix.bfloat16()
    source = torch.randn(4 * side, side, device=device())
    target = torch.empty_like(source)
    actions: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "bfloat16": lambda: half @ half,
        "float32": lambda: matrix @ matrix,
    }
    seconds = {name: min(times) for name, times in timed(actions, rounds).items()}
    return {
        "copy_bytes_per_second": 2 * source.nbytes / seconds["copy"],
        "bfloat16_flops_per_second": 2 * side**3 / seconds["bfloat16"],
        "float32_flops_per_second": 2 * side**3 / seconds["float32"],
    }


def beside(floors: Mapping[str, float], seconds: Mapping[str, list[float]]) -> Figures:
    """The spread of each action's times, and its median over its floor."""
    found: Figures = {}
    for name, times in seconds.items():
        figures = spread(times)
        ratio = figures["median_seconds"] / floors[name]
        found[name] = {
            **figures,
            "floor_seconds": floors[name],
            "ratio_to_floor": ratio,
        }
    return found


def step_rows(
    shape: str, dtype: torch.dtype, bits: Sequence[int], bandwidth: float, tiny: bool
) -> Figures:
    """Sketches of a whole gradient, beside one read of it.

    Args:
        shape: one of those of `per_example_cost`.
        dtype: dtype of the gradient.
        bits: log2 of the sketch sizes.
        bandwidth: bytes per second of a copy.
        tiny: small sizes, as a check.
    """
    of = SHAPES[shape].tiny if tiny else SHAPES[shape]
    config = AutoConfig.for_model(of.model_type, **of.config)
    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    shapes = tuple((name, tuple(p.shape)) for name, p in parameters.items())
    gradients = {
        name: torch.randn(size, device=device(), dtype=dtype) for name, size in shapes
    }
    actions: dict[str, Callable[[], Any]] = {}
    for layout in ("grouped", "blocked"):
        for power in bits:
            sketch = ModelSketch(shapes, 2**power, layout)
            actions[f"{layout} 2^{power}"] = partial(sketch.sketch, gradients)
    sketch = ModelSketch(shapes, 2 ** bits[len(bits) // 2], operator="affd")
    actions[f"blocked AFFD 2^{bits[len(bits) // 2]}"] = partial(
        sketch.sketch, gradients
    )
    floor = sum(x.nbytes for x in gradients.values()) / bandwidth
    return beside(dict.fromkeys(actions, floor), timed(actions, 1 if tiny else 5))


def scoring(rows: int, out_size: int, rates: Mapping[str, float]) -> Figures:
    """The best rows of those that are on the device, for 100 and 1,000 queries.

    The floor is the longer of a read of the rows and the product in float32.
    """
    few = max(1, _BLOCK_ELEMENTS // out_size)
    actions: dict[str, Callable[[], Any]] = {}
    floors: dict[str, float] = {}
    drawn = torch.randn(min(few, rows), out_size, device=device())
    for dtype in ("float16", "int8"):
        scale, kept = encode([drawn], dtype)
        times = -(-rows // len(kept))
        for count in (100, 1000):
            name = f"{dtype}, {count} queries"
            queries = QueryMatrix((torch.randn(count, out_size, device=device()),))
            actions[name] = partial(_best, queries, scale, kept, times)
            read = times * kept.nbytes / rates["copy_bytes_per_second"]
            flops = 2 * times * kept.numel() * count
            floors[name] = max(read, flops / rates["float32_flops_per_second"])
    return beside(floors, timed(actions, 1))


def _best(queries: QueryMatrix, scale: Tensor, kept: Tensor, times: int) -> BestRows:
    """Find the best of the same rows `times` times, as if they were others."""
    best = BestRows.none(len(queries.states[0]), kept.device)
    for number in range(times):
        start = number * len(kept)
        block = RowBlock(start, kept.float(), scale, {})
        scores = queries.times(block) * scale
        places = torch.arange(start, start + len(kept), device=kept.device)
        best = best.and_of(scores, places, _TOP)
    return best
