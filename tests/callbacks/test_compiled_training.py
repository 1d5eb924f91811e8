"""Recorded steps of a compiled model run uncompiled, the others as they did."""

import pytest

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.rows import assert_same_rows
from tests.helpers.trained.training import tiny_bert, tiny_trainer

SIZE = 64
UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


def trained(directory, callback, **arguments):
    model = tiny_bert(**UNDROPPED, num_hidden_layers=1)
    settings = {"gradient_accumulation_steps": 1, "save_strategy": "no"}
    tiny_trainer(directory, callback, model=model, **settings, **arguments).train()
    return load_sketches(directory)


@pytest.mark.filterwarnings("ignore")  # of torch, as it compiles
def test_rows_of_compiled_training_are_those_of_uncompiled_training(tmp_path):
    plain = trained(tmp_path / "plain", GradientSketchCallback(SIZE, every_steps=3))
    callback = GradientSketchCallback(SIZE, every_steps=3)
    with pytest.warns(UserWarning, match="recorded steps run uncompiled"):
        got = trained(tmp_path / "compiled", callback, **COMPILED)
    assert_same_rows(got, plain)
