"""Sketch sizes to measure at; wall time and memory of actions, side by side."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_sketch import Sketch
from hf_sketch.recipes.placement import synchronize


def fitting_bits(bits: str, elements: int) -> list[int]:
    """Those of the sizes that a gradient has room for, in order.

    Args:
        bits: log2 of the sizes, comma-separated; 1 is the least.
        elements: the number of the gradient's elements.

    Raises:
        ValueError: there are none.
    """
    most = elements.bit_length() - 1
    fitting = sorted({b for b in map(int, bits.split(",")) if 1 <= b <= most})
    if not fitting:
        raise ValueError(
            f"bits must hold a number in [1, {most}] for {elements} elements, got "
            f"{bits!r}: pass --bits {most}."
        )
    return fitting


def timed(actions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each action in each round, all actions in turn.

    Each runs twice in a row and the second time counts: the first one after another
    action pays for the memory that was given back in between.

    Raises:
        ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}: pass 1 or more.")
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in tqdm(range(rounds + 1), desc="Rounds"):
        for name, action in actions.items():
            action()
            synchronize()
            start = time.perf_counter()
            action()
            synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    """The median and the extremes of an action's times."""
    return {
        "median_seconds": median(seconds),
        "least_seconds": min(seconds),
        "greatest_seconds": max(seconds),
    }


def peak_extra_bytes(action: Callable[[], Any]) -> int:
    """The most bytes that torch holds during an action beyond those before it."""
    with torch.profiler.profile(profile_memory=True) as profile:
        action()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def operator_costs(
    cases: Mapping[str, tuple[Sketch, Callable[[Sketch], Tensor]]], rounds: int
) -> dict[str, dict[str, float]]:
    """The spread of the times and the extra peak of each use of an operator.

    An operator is timed after its first uses, with all that it keeps at hand, but its
    peak is that of a new one, so that what it keeps counts.

    Args:
        cases: cases by name, the operator and what is done with it.
        rounds: see `timed`.
    """
    actions = {name: partial(use, operator) for name, (operator, use) in cases.items()}
    costs: dict[str, dict[str, float]] = {}
    for name, seconds in timed(actions, rounds).items():
        operator, use = cases[name]
        peak = peak_extra_bytes(partial(_use_anew, operator, use))
        costs[name] = {**spread(seconds), "extra_peak_bytes": peak}
    return costs


def milliseconds(cost: Mapping[str, float]) -> str:
    """The times of a cost as text: median (least..greatest)."""
    least, middle, greatest = (
        f"{1e3 * cost[f'{which}_seconds']:.4g}"
        for which in ("least", "median", "greatest")
    )
    return f"{middle} ({least}..{greatest})"


def _use_anew(operator: Any, use: Callable[[Sketch], Tensor]) -> Tensor:
    """Use an equal operator that keeps nothing yet."""
    return use(dataclasses.replace(operator))
