import pytest

from hf_sketch.recipes.tables.costs.flushes import FlushesArguments, run_flushes


@pytest.mark.full
def test_the_costs_of_many_flushes_are_measured(tmp_path, capsys):
    arguments = FlushesArguments(
        output_dir=str(tmp_path / "out"), work_dir=str(tmp_path), tiny=True
    )
    results = run_flushes(arguments)
    written = results["manifest_bytes"]
    assert list(written) == [*range(2, 21, 2)]
    assert written[20] - written[10] == pytest.approx(written[12] - written[2], 0.05)
    assert results["joined_while_recording"]["files"] == 20  # too few to join
    assert results["many_files"]["files"] == 20
    assert results["joined_files"]["files"] == 1
    assert results["many_files"]["rows"] == results["joined_files"]["rows"] == 200
    assert "20 flushes: " in capsys.readouterr().out
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]
