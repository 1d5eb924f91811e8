import json

import pytest

from hf_sketch.recipes.tables.costs.gpu import GpuArguments, run_gpu


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
