"""What the page says of training: its loss, and the examples that stayed hard."""

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hf_sketch.attribution.collection import GradientRows
from hf_sketch.attribution.columns import column
from hf_sketch.attribution.questions.noise import LEAST, has_parts

_WORST = 100
_SPIKES = 50
_NAMED = 5  # examples of a spike
_ENDS = 20
_FREE = 9  # (1 + 2 / 9) / (1 + 1 / 9) = 1.1 times the examples


def loss_ends(store: GradientRows) -> tuple[float, float] | None:
    """Return the mean loss over the first and the last 20th of the steps.

    None if no loss is known.
    """
    steps, losses = column(store.dataset, "step"), column(store.dataset, "loss")
    known = np.isfinite(losses)
    if not known.any():
        return None
    steps, losses = steps[known], losses[known]
    span = (steps.max() - steps.min() + 1) / _ENDS
    first = losses[steps < steps.min() + span]
    last = losses[steps > steps.max() - span]
    return float(first.mean()), float(last.mean())


def examples_table(
    store: GradientRows, mentioned: Mapping[int, str | None]
) -> list[dict[str, Any]]:
    """Return the 100 examples whose last loss is largest, and those mentioned.

    Args:
        store: rows of training.
        mentioned: texts, if they are known, by example id.

    Returns:
        largest last loss first: example_id, first and last loss, number of rows, last
        step and text.
    """
    names = "example_id", "loss", "step"
    ids, losses, steps = (column(store.dataset, name) for name in names)
    order = np.lexsort((steps, ids))
    ids, losses, steps = ids[order], losses[order], steps[order]
    firsts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1))
    lasts = np.append(firsts[1:], len(ids))[: len(firsts)] - 1
    worst = np.argsort(-np.nan_to_num(losses[lasts], nan=-np.inf), kind="stable")
    named = np.isin(ids[lasts[worst]], [*mentioned])
    return [
        {
            "example_id": int(ids[lasts[place]]),
            "first": float(losses[firsts[place]]),
            "last": float(losses[lasts[place]]),
            "rows": int(lasts[place] - firsts[place] + 1),
            "step": int(steps[lasts[place]]),
            "text": mentioned.get(int(ids[lasts[place]])),
        }
        for place in worst[(np.arange(len(worst)) < _WORST) | named]
    ]


def noise_course(store: GradientRows) -> dict[str, Any] | None:
    """Return the noise scale of steps, and when a batch twice as large is nearly free.

    Of a batch B at a noise scale of 9 B, twice as many examples need half the steps and
    a tenth more examples.

    Returns:
        lines (see `noise_scale`), batch (the median number of examples per step), last
        (the line of the last step) and free_from (the first step after which the lower
        end of the interval stays at 9 batches or more; None if there is none). None if
        fewer than ten steps have a noise scale, or the store is of several runs or has
        parts of examples.
    """
    if not _is_of_one_run(store) or has_parts(store.dataset):
        return None
    lines = store.noise_scale()
    if len(lines) < LEAST:
        return None
    batch = int(np.median(column(lines, "step_examples")))
    enough = column(lines, "low") >= _FREE * batch
    after = len(lines) - int(np.logical_and.accumulate(enough[::-1]).sum())
    free = int(column(lines, "step")[after]) if after < len(lines) else None
    return {"lines": lines, "batch": batch, "last": lines[-1], "free_from": free}


def audit_table(path: Path) -> list[dict[str, Any]]:
    """Return the 100 most suspicious examples of `hf-sketch audit`, in its order."""
    with path.open() as lines:
        return [json.loads(line) for line in islice(lines, _WORST)]


def guard_table(path: Path) -> dict[str, Any]:
    """Return what a guard found, from its file.

    Returns:
        judged (the number of steps), found (the number of those that stood out) and
        lines (the first 50 of these, with their first five examples, and `more`, the
        number of others).
    """
    with path.open() as file:
        lines = [json.loads(line) for line in file if line.endswith("\n")]
    found = [line for line in lines if line["action"]]
    shown = [
        {**line, "examples": own[:_NAMED], "more": max(0, len(own) - _NAMED)}
        for line in found[:_SPIKES]
        for own in [line["examples"]]
    ]
    return {"judged": len(lines), "found": len(found), "lines": shown}


def spikes_table(store: GradientRows) -> list[dict[str, Any]] | None:
    """Return the 50 steps that stand out most, in order, with their strongest examples.

    None if the store cannot tell: it lacks rows of steps or of examples, or is of
    several runs.
    """
    if not _is_of_one_run(store):
        return None
    spikes: dict[int, dict[str, Any]] = {}
    for line in store.find_spikes().to_list():
        spike = spikes.setdefault(line["step"], {**line, "named": []})
        spike["named"].append((line["example_id"], line["share"]))
    for spike in spikes.values():
        height = spike["loss_deviation"], spike["norm_deviation"]
        spike["height"] = float(np.nanmax(height))
        spike["more"] = max(0, len(spike["named"]) - _NAMED)
        spike["named"] = spike["named"][:_NAMED]
    highest = sorted(spikes.values(), key=lambda spike: -spike["height"])[:_SPIKES]
    return sorted(highest, key=lambda spike: spike["step"])


def _is_of_one_run(store: GradientRows) -> bool:
    """Return whether there are rows of examples, and one row of each step."""
    if store.steps is None or not len(store.steps) or not len(store.dataset):
        return False
    steps = column(store.steps, "step")
    return len(np.unique(steps)) == len(steps)
