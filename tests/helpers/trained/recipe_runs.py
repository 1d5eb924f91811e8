"""What tests of recipes and tables share."""

import gzip
import importlib.util
import json

import pytest
import torch

from hf_sketch.recipes.xsum import XsumArguments, XsumTrainingArguments, run_xsum

barely_trained = pytest.mark.filterwarnings(
    "ignore:.* must be worse than the target of .* before training:UserWarning"
)


def make_absent(monkeypatch, *packages):
    """Let packages look as if they were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name in packages else find(name, *rest),
    )


def assert_saved(path, results):
    """What was returned is what was saved, with the versions."""
    saved = json.loads(path.read_text())
    assert saved["results"] == json.loads(json.dumps(results))
    assert saved["versions"]["torch"] == torch.__version__
    assert saved["machine"]["threads"] == torch.get_num_threads()


def write_lines(path, rows):
    """Write rows as JSON lines, compressed if the name ends so."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def small_xsum(directory, settings=None, **training):
    """The small run on our documents, with a target that it does not reach."""
    changes = {"target": 99.0, **(settings or {})}
    return run_xsum(
        XsumArguments(small=True, stage_steps=1, max_dim=64, **changes),
        XsumTrainingArguments(
            output_dir=str(directory), save_steps=1, disable_tqdm=True, **training
        ),
    )
