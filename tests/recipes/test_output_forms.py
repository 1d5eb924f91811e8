"""Results as JSON, or not at all."""

import json

import pytest
import torch

from hf_sketch.cli import main
from hf_sketch.spectra.files import save_spectrum
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP
from hf_sketch.store.writer import SketchWriter
from tests.helpers.spectra import VALUES, made_of
from tests.helpers.stores import SKETCH, example_rows, step_row

ALL = ("info", "verify", "spectrum", "spikes")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A run of 13 steps, the last of which has a gradient of NaN, and a spectrum."""
    directory = tmp_path_factory.mktemp("run")
    writer = SketchWriter(directory / "sketches", Header(SKETCH, train_rows=2))
    for step in range(1, 14):
        columns = example_rows(step, [0, 1])
        row = step_row(step, 1.0)
        if step == 13:
            columns["sketch"] = columns["sketch"] * torch.nan
            columns["finite"] = torch.zeros(2, dtype=torch.bool)
            row["finite"] = torch.zeros(1, dtype=torch.bool)
        writer.append(PER_EXAMPLE, columns)
        writer.append(PER_STEP, row)
    writer.flush()
    writer.close()
    save_spectrum(directory / "curvature", made_of(VALUES))
    return directory


@pytest.mark.parametrize("command", ALL)
def test_json_is_all_that_is_printed(directory, capsys, command):
    main([command, str(directory), "--json"])
    printed = capsys.readouterr().out
    found = json.loads(printed, parse_constant=pytest.fail)  # NaN is no JSON
    if command == "info":
        (store,) = found
        assert store["per_example"]["rows"] == 26
        assert store["per_step"]["last_step"] == 13
        assert (store["out_size"], store["train_rows"]) == (4, 2)
        assert store["processes"] == [{"rank": 0, "last_step": 13, "gaps": []}]
    if command == "verify":
        assert found == []
    if command == "spectrum":
        ((spectrum,),) = found.values()
        assert spectrum["top_eigenvalues"] == pytest.approx(sorted(VALUES)[::-1])
    if command == "spikes":
        assert [line["step"] for line in found] == [13, 13]
        assert [line["share"] for line in found] == [None, None]


@pytest.mark.parametrize("command", ALL)
def test_quiet_prints_nothing(directory, capsys, command):
    main([command, str(directory), "--quiet"])
    assert capsys.readouterr().out == ""


def test_a_check_that_fails_says_so_in_every_form(directory, tmp_path, capsys):
    broken = tmp_path / "run"
    writer = SketchWriter(broken / "sketches", Header(SKETCH))
    writer.append(PER_STEP, step_row(1))
    writer.flush()
    writer.close()
    next((broken / "sketches").glob("*.arrow")).unlink()
    for options in ([], ["--json"], ["--quiet"]):
        with pytest.raises(SystemExit, match=r"^1$"):
            main(["verify", str(broken), *options])
        printed = capsys.readouterr().out
        if options == ["--json"]:
            assert len(json.loads(printed)) == 1
        else:
            assert ("per_step" in printed) == (options == [])


def test_both_forms_at_once_are_refused(directory, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["info", str(directory), "--json", "--quiet"])
    assert "not allowed with argument" in capsys.readouterr().err
