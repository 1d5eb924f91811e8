"""What is leaned on in TRL beneath its public names, as read in 1.0 to 1.16."""

import importlib.util
import inspect

import pytest

from hf_sketch.callbacks.recording.origins import answers

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("trl") is None, reason="needs the package trl"
    ),
    pytest.mark.filterwarnings("ignore"),  # TRL's own
]


@pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer"])
def test_trainers_that_generate_judge_and_score_answers_in_methods(name):
    kind = getattr(importlib.import_module("trl"), name)
    judging, scoring = (getattr(kind, x) for x in (answers._JUDGING, answers._SCORING))
    assert [*inspect.signature(judging).parameters][:2] == ["self", "inputs"]
    assert [*inspect.signature(scoring).parameters] == ["self", "inputs"]
    # The weighted sums of what the first returns, and this, become columns.
    assert "self.reward_weights" in inspect.getsource(scoring)
    assert f'"{answers._ADVANTAGES}"' in inspect.getsource(scoring)
    prepares = inspect.getsource(kind._prepare_inputs)
    assert f"self.{answers._SCORING}(" in prepares
