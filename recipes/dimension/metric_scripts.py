"""The metric scripts that come with the recipes."""

import importlib
import importlib.util
from importlib.resources import files
from typing import Any


def load_metric(name: str) -> Any:
    """An `evaluate.Metric` from its script, without the Hub.

    Args:
        name: "accuracy", a fraction, or "rouge", from 0 to 100.

    Raises:
        ModuleNotFoundError: the extra `recipes` is not installed.
    """
    missing = [
        package
        for package in ("evaluate", "rouge_score")
        if importlib.util.find_spec(package) is None
    ]
    if missing:
        raise ModuleNotFoundError(
            f"metrics need the packages evaluate and rouge_score, got no {missing}: "
            "pip install 'hf-sketch[recipes]'."
        )
    evaluate = importlib.import_module("evaluate")
    folder = files("hf_sketch.recipes").joinpath("metrics", name)
    return evaluate.load(str(folder), keep_in_memory=True)
