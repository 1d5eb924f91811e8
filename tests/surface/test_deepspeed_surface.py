"""What is leaned on in DeepSpeed beneath its public names, as read in 0.19.8."""

import importlib
import importlib.util
import inspect

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed"
)


@pytest.mark.filterwarnings("ignore")
def test_parameters_that_zero_3_splits_keep_their_shape(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    stage = importlib.import_module("deepspeed.runtime.zero.partition_parameters")
    source = inspect.getsource(stage.Init._convert_to_deepspeed_param)
    assert "param.ds_shape = param.shape" in source
