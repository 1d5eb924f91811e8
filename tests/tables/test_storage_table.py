import pytest

from hf_sketch.recipes.tables.costs.storage import StorageArguments, run_storage


@pytest.mark.full
def test_the_costs_of_the_store_are_measured(tmp_path, capsys):
    arguments = StorageArguments(
        output_dir=str(tmp_path / "out"), work_dir=str(tmp_path), tiny=True
    )
    results = run_storage(arguments)
    writing, opening = results["writing"], results["opening"]
    assert writing["bytes"] > 256 * 4096 * 2
    floor, own = writing["plain_file"], writing["store"]
    ratio = floor["median_seconds"] / own["median_seconds"]
    assert writing["speed_of_plain"] == pytest.approx(ratio)  # of one round
    assert opening["rows"] == 200
    assert results["rounding"]["float32"] == 0
    assert 0 < results["rounding"]["float16"] < results["rounding"]["int8"] < 1e-3
    assert "of its speed" in capsys.readouterr().out
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]
