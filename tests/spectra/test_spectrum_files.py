import dataclasses
import json
from itertools import pairwise

import pytest
import torch

from hf_sketch import CurvatureCheck, hessian_spectrum, load_spectra
from hf_sketch.durable import read_sealed, write_sealed
from hf_sketch.spectra.files import save_spectrum
from tests.helpers.spectra import (
    SIZE,
    VALUES,
    Quadratic,
    assert_equal,
    made_of,
    sketched,
)


@pytest.mark.parametrize("check", [CurvatureCheck(None, 1 / 3), None])
def test_what_is_saved_is_what_is_loaded(tmp_path, check):
    model = Quadratic(torch.linspace(-1, 5, 64).tolist())
    taken = hessian_spectrum(sketched(model, 16), 8, step=12, progress=False)
    spectra = [
        dataclasses.replace(taken, check=check),
        made_of(kept=()),
        made_of(step=0),
    ]
    spectra[1] = dataclasses.replace(spectra[1], step=7)
    for spectrum in spectra:
        path = save_spectrum(tmp_path / "curvature", spectrum)
        assert path.name == f"step-{spectrum.step:08d}.json"
    for place in (tmp_path, tmp_path / "curvature"):
        loaded = load_spectra(place)
        assert [spectrum.step for spectrum in loaded] == [0, 7, 12]
        for spectrum, saved in zip(loaded, spectra[::-1], strict=True):
            assert_equal(spectrum, saved)
    assert sorted(p.suffix for p in (tmp_path / "curvature").iterdir()) == (
        [".json"] * 3 + [".safetensors"] * 3
    )


def test_a_run_in_a_directory_called_curvature_is_found(tmp_path):
    output_dir = tmp_path / "curvature"
    save_spectrum(output_dir / "curvature", made_of())
    assert len(load_spectra(output_dir)) == 1


def test_the_json_file_can_be_read_by_anything(tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    for spectrum in (made_of(), made_of(kept=()), made_of((-4.0, -2.0), (0, 0), ())):
        path = save_spectrum(tmp_path, spectrum)
        summary = json.loads(path.read_text(), parse_constant=refuse)["summary"]
        assert summary["eigenvalues"] == spectrum.eigenvalues.tolist()
        assert summary["outliers"] == spectrum.outliers


def test_no_spectra_are_an_error_that_says_where(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No spectra at .*curvature\. Pass"):
        load_spectra(tmp_path)


def damage(path, start, end=None, instead=b""):
    data = path.read_bytes()
    path.write_bytes(data[:start] + instead + (data[end:] if end else b""))


@pytest.mark.parametrize("ending", [".json", ".safetensors"])
@pytest.mark.parametrize("change", [(-10,), (200, 201, b"\x01"), (0,)], ids=str)
def test_damaged_files_are_recognized(tmp_path, ending, change):
    path = save_spectrum(tmp_path / "curvature", made_of())
    damage(path.with_suffix(ending), *change)
    message = rf"step-00000003\{ending} must have the digest \w+.*got .*restore it"
    with pytest.raises(ValueError, match=message):
        load_spectra(tmp_path)


def test_a_missing_half_is_reported(tmp_path):
    path = save_spectrum(tmp_path / "curvature", made_of())
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(
        ValueError, match="of 0 bytes: restore it, or move step-00000003"
    ):
        load_spectra(tmp_path)


def test_another_version_is_refused(tmp_path):
    path = save_spectrum(tmp_path / "curvature", made_of())
    content = read_sealed(path)
    write_sealed(path, {"format_version": 3, "other": content["step"]})
    message = (
        "has format_version 3, and this hf-sketch reads up to 2. Open it with the "
        "hf-sketch"
    )
    with pytest.raises(ValueError, match=message):
        load_spectra(tmp_path)


def test_spectra_of_version_1_take_the_scatter_of_a_gaussian_matrix(tmp_path):
    path = save_spectrum(tmp_path / "curvature", made_of())
    content = read_sealed(path)
    del content["scatter"]
    write_sealed(path, {**content, "format_version": 1})
    (spectrum,) = load_spectra(tmp_path)
    assert_equal(spectrum, made_of())
    gaussian = torch.full((len(VALUES),), 2 / SIZE, dtype=torch.float64)
    same = made_of(scatter=gaussian).standard_errors
    assert spectrum.standard_errors.tolist() == same.tolist()


def test_the_scatter_is_kept(tmp_path):
    scatter = torch.linspace(0.01, 0.06, len(VALUES), dtype=torch.float64)
    save_spectrum(tmp_path / "curvature", made_of(scatter=scatter))
    (spectrum,) = load_spectra(tmp_path)
    assert_equal(spectrum, made_of(scatter=scatter))


def test_files_half_written_are_no_spectra(tmp_path):
    path = save_spectrum(tmp_path / "curvature", made_of())
    path.with_name("step-00000009.safetensors").write_bytes(b"alone")
    path.with_name("step-00000009.json.tmp").write_bytes(b"{")
    steps = [spectrum.step for spectrum in load_spectra(tmp_path)]
    assert all(one < other for one, other in pairwise([*steps, 9]))
    assert steps == [3]
