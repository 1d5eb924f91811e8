"""Saving what a script measured or trained, with all that repeating it takes."""

import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCardData

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


def save_card(directory: Path, data: ModelCardData, text: str) -> Path:
    """Write a model's card, `<directory>/README.md`, with the versions that made it.

    Args:
        directory: folder of the model.
        data: metadata for the Hub; the tag `hf-sketch` is added.
        text: Markdown, from the title on.
    """
    data.tags = ["hf-sketch", *(data.tags or [])]
    versions = (
        f"Made by hf-sketch {hf_sketch.__version__} with torch {torch.__version__} and "
        f"transformers {transformers.__version__}."
    )
    path = directory / "README.md"
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n\n{versions}\n")
    return path
