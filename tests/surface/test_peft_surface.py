"""What the subspace method leans on in PEFT, as read in 0.21.2.

A new PEFT that changes it fails here. Names with an underscore have no public way.
"""

import inspect

import peft
import pytest
from peft import mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES

from hf_sketch import SubspaceConfig
from hf_sketch.subspace.tuner import SubspaceModel


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("name", "leading"),
    [
        ("_pre_injection_hook", ["self", "model", "config", "adapter_name"]),
        ("inject_adapter", ["self", "model", "adapter_name"]),
        ("set_adapter", ["self", "adapter_name", "inference_mode"]),
        ("merge_adapter", ["self", "adapter_names", "safe_merge"]),
        ("unmerge_adapter", ["self"]),
        ("delete_adapter", ["self", "adapter_name"]),
        ("set_requires_grad", ["self", "adapter_names", "requires_grad"]),
        ("_enable_adapter_layers", ["self", "enabled"]),
        (
            "_unload_and_optionally_merge",
            ["self", "merge", "progressbar", "safe_merge", "adapter_names"],
        ),
        ("_create_and_replace", ["self"]),
        ("_prepare_adapter_config", ["self", "peft_config", "model_config"]),
        (
            "_cast_adapter_dtype",
            ["self", "adapter_name", "autocast_adapter_dtype"],
        ),
        ("_inject_parameters", ["self", "peft_config", "model", "adapter_name"]),
    ],
)
def test_tuners_have_the_methods_that_ours_overrides(name, leading):
    theirs = parameters(getattr(BaseTuner, name))
    assert theirs[: len(leading)] == leading
    assert name in vars(SubspaceModel)


def test_layers_have_what_ours_inherits():
    for name in ("set_adapter", "delete_adapter", "enable_adapters"):
        assert callable(getattr(BaseTunerLayer, name))
    for name in ("active_adapters", "disable_adapters", "set_requires_grad"):
        assert hasattr(BaseTunerLayer, name)
    assert DUMMY_TARGET_MODULES == "dummy-target-modules"


def test_the_method_is_in_pefts_tables():
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["SUBSPACE"] is SubspaceConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["SUBSPACE"] is SubspaceModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["SUBSPACE"] == "subspace_"
    taken = [str(name) for name in peft.PeftType]
    assert not any("SUBSPACE" in name for name in taken)
