"""How many bad batches each rule finds, and at how many false alarms."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_sketch.recipes.tables.quality.planted_spikes import wilson

RULES = ("opposition", "loss", "gradient_norm")
GUARD = ("opposition", "loss")  # what the callback looks at
_FALSE_ALARMS = 0.01
_THRESHOLDS = (3.0, 4.0, 5.0)


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what each rule finds, at fixed thresholds and at 1% false alarms."""
    kinds = np.concatenate([run["kinds"] for run in runs])
    values = {
        name: np.concatenate([run["deviations"][name] for run in runs])
        for name in RULES
    }
    judged = ~np.isnan(values["opposition"])
    good = judged & (kinds == "")
    rules: dict[str, Any] = {
        name: {f"{t:g}": values[name] > t for t in _THRESHOLDS} for name in RULES
    }
    rules["guard"] = {
        t: rules["opposition"][t] | rules["loss"][t] for t in rules["loss"]
    }
    for name in RULES:
        bar = np.quantile(values[name][good], 1 - _FALSE_ALARMS)
        rules[name]["at 1%"] = values[name] > bar
    ends = np.maximum(*(values[name] for name in GUARD))
    rules["guard"]["at 1%"] = ends > np.quantile(ends[good], 1 - _FALSE_ALARMS)
    results: dict[str, Any] = {"runs": len(runs), "good_steps": int(good.sum())}
    for name, by_bar in rules.items():
        results[name] = {
            bar: {
                "false_alarms": wilson(int(found[good].sum()), int(good.sum())),
                "found": {
                    kind: wilson(int(found[own].sum()), int(own.sum()))
                    for kind in sorted({*kinds} - {""})
                    for own in [judged & (kinds == kind)]
                },
            }
            for bar, found in by_bar.items()
        }
    named = [one for run in runs for one in run["named"]]
    for key in ("part_of_bad", "part_of_named"):
        parts = [one[key] for one in named]
        results[key] = float(np.mean(parts)) if parts else None
    results["cost"] = [run["cost"] for run in runs]
    return results
