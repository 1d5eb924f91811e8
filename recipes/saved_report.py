"""Saving what a table's script measured, with all that a reader needs to repeat it."""

import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_sketch
from hf_sketch.recipes.placement import device_name


@dataclass
class ReportArguments:
    """What the arguments of every table's script begin with."""

    output_dir: str = field(
        default="out/tables", metadata={"help": "Folder for the results."}
    )


def save_report(output_dir: str, name: str, arguments: Any, results: Any) -> Path:
    """Write `<output_dir>/<name>.json`: versions, machine, arguments and results."""
    report = {
        "table": name,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "hf_sketch": hf_sketch.__version__,
        },
        "machine": {
            "processor": platform.machine(),
            "device": device_name(),
            "threads": torch.get_num_threads(),
        },
        "arguments": vars(arguments),
        "results": results,
    }
    path = Path(output_dir) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1))
    return path
