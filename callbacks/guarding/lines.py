"""The lines of `guard.jsonl`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from transformers import Trainer

from hf_sketch.durable import replace_file

Line = dict[str, Any]
NOT_FINITE: Final = "not finite"


def lines_before(path: Path, trainer: Trainer) -> list[Line]:
    """Return the lines of steps before this run's, and drop all others."""
    if trainer.args.process_index or not path.exists():
        return []
    lines: list[Line] = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break  # the last one, which a kill has cut off
    lines = [line for line in lines if line["step"] <= trainer.state.global_step]
    data = "".join(json.dumps(line) + "\n" for line in lines)
    replace_file(path, data.encode())
    return lines


def finite_values(values: Mapping[str, Any]) -> Line:
    """Return values with None for those that are not finite, as JSON has it."""
    return {
        name: None if isinstance(x, float) and not np.isfinite(x) else x
        for name, x in values.items()
    }


def sentence_of(line: Line) -> str:
    """Return a line of the file as a sentence."""
    parts: list[str] = []
    for name in line["reasons"]:
        if name == NOT_FINITE:
            parts.append("rows are NaN or infinite")
        else:
            far = line[f"{name}_deviation"]
            parts.append(f"its {name} is {line[name]:.3g}, {far:.1f} deviations above")
    done = {"warn": "", "skip": " The optimizer made no step."}
    done["quarantine"] = " The optimizer made no step; they get no label from now on."
    why = " and ".join(parts) or "a batch holds nothing but quarantined examples"
    ids = [one["example_id"] for one in line["examples"]]
    shown = ", ".join(map(str, ids[:8])) + ", ..." * (len(ids) > 8)
    named = f" Examples {shown} ({len(ids)} in all)." if ids else ""
    return f"Step {line['step']} stands out: {why}.{named}{done[line['action']]}"
