"""What the store says of the comparison with gradients of single examples."""

import json

import pytest

from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.store.contents import describe
from tests.helpers.trained.training import tiny_trainer


@pytest.mark.parametrize("measure_error", [True, False])
def test_the_store_says_whether_modules_were_compared(tmp_path, measure_error):
    callback = GradientSketchCallback(64, measure_error=measure_error)
    tiny_trainer(tmp_path, callback, max_steps=1).train()
    header = json.loads((tmp_path / "sketches" / "header.json").read_text())
    reason = None if measure_error else "it was switched off"
    assert header["unverified"] == reason
    line = "not compared with single examples: it was switched off"
    assert (line in describe(tmp_path / "sketches")) != measure_error
