"""What tests of recipes and tables share."""

import gzip
import importlib.util
import json

import torch


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
