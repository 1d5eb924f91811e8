import json

import pytest
import torch
from torch.nn import functional

from hf_sketch.example_losses import example_losses
from hf_sketch.recipes.tables.gpu import GpuArguments, run_gpu


def test_the_gpu_table_joins_the_sections_of_several_runs(tmp_path):
    for section in ("ceilings", "agreement"):
        run_gpu(GpuArguments(str(tmp_path), section, rounds=1, tiny=True))
    saved = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert saved["ceilings"]["results"]["copy_bytes_per_second"] > 0
    distances = saved["agreement"]["results"].values()
    assert max(max(pair.values()) for pair in distances) < 1e-5


def test_an_unknown_section_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"sections must be among .*\['neither'\]"):
        run_gpu(GpuArguments(str(tmp_path), "neither"))


def test_a_loss_that_autocast_rounded_is_split():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 3, generator=generator)
    labels = torch.arange(8) % 3
    rounded = logits.bfloat16()
    loss = functional.nll_loss(rounded.log_softmax(-1).float(), labels)
    got = example_losses(loss, rounded.float(), labels)
    expected = functional.cross_entropy(rounded.float(), labels, reduction="none")
    torch.testing.assert_close(got.losses, expected)
    assert abs(loss - expected.mean()) > 1e-4  # too far for float32
    with pytest.raises(ValueError, match="a mean of the examples' own losses"):
        example_losses(loss, rounded.float() + 1e-6 * logits, labels)
