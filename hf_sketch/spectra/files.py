"""Spectra on disk: `<output_dir>/curvature/step-XXXXXXXX.json` and `.safetensors`."""

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any, Final

import xxhash
from safetensors.torch import load, save
from torch import Tensor

from hf_sketch.curvature.check import CurvatureCheck
from hf_sketch.durable import read_sealed, replace_file, set_aside, write_sealed
from hf_sketch.model.sketch import ModelSketch
from hf_sketch.spectra.spectrum import Spectrum

FORMAT_VERSION: Final = 2  # since when `scatter` is stored
DIRECTORY: Final = "curvature"


def save_spectrum(directory: Path, spectrum: Spectrum) -> Path:
    """Write a spectrum, its tensors first; it counts once its JSON file exists.

    The JSON file also has the eigenvalues and statistics, to be read by eye.

    Returns:
        the JSON file.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step-{spectrum.step:08d}.json"
    own = {f.name: getattr(spectrum, f.name) for f in dataclasses.fields(spectrum)}
    tensors = {n: x.contiguous() for n, x in own.items() if isinstance(x, Tensor)}
    data = save(tensors)
    replace_file(path.with_suffix(".safetensors"), data)
    apart = (*tensors, "model_sketch", "check")
    content = {
        "format_version": FORMAT_VERSION,
        **{name: own[name] for name in own if name not in apart},
        "model_sketch": spectrum.model_sketch.to_dict(),
        "check": spectrum.check and dataclasses.asdict(spectrum.check),
        "tensors_xxh3_128": xxhash.xxh3_128_hexdigest(data),
        "summary": _summary(spectrum),
    }
    write_sealed(path, content)
    return path


def load_spectra(path: str | Path) -> list[Spectrum]:
    """Return the spectra that a HessianSpectrumCallback wrote, by step.

    Args:
        path: the Trainer's `output_dir`, or the `curvature` directory in it.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is damaged, or has another format version.
    """
    directory = Path(path)
    if directory.name != DIRECTORY or (directory / DIRECTORY).is_dir():
        directory = directory / DIRECTORY
    files = sorted(directory.glob("step-*.json"))
    if not files:
        raise FileNotFoundError(
            f"No spectra at {directory}. Pass the output_dir of a run with "
            "HessianSpectrumCallback."
        )
    return [_read_spectrum(file) for file in files]


def _read_spectrum(path: Path) -> Spectrum:
    content = read_sealed(path)
    version = content.pop("format_version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise ValueError(
            f"{path} has format_version {version!r}, and this hf-sketch reads up to "
            f"{FORMAT_VERSION}. Open it with the hf-sketch that wrote it."
        )
    file = path.with_suffix(".safetensors")
    data = file.read_bytes() if file.is_file() else b""
    expected, digest = content.pop("tensors_xxh3_128"), xxhash.xxh3_128_hexdigest(data)
    if digest != expected:
        raise ValueError(
            f"{file} must have the digest {expected}, got {digest} of {len(data)} "
            f"bytes: restore it, or move {path.name} and it away."
        )
    del content["summary"]
    sketch: ModelSketch = ModelSketch.from_dict(content.pop("model_sketch"))
    check: dict[str, Any] | None = content.pop("check")
    fields: dict[str, Any] = {**content, **load(data)}
    fields["check"] = None if check is None else CurvatureCheck(**check)
    return Spectrum(model_sketch=sketch, **fields)


def continue_spectra(directory: Path, sketch: ModelSketch, step: int) -> None:
    """Keep the spectra up to a step that training resumes from, and of no other run.

    At step 0 training starts: earlier spectra are set aside with a warning.

    Raises:
        ValueError: a file is damaged, or of another sketch or format version.
    """
    if not any(directory.glob("step-*.json")):
        return
    if step == 0:
        warnings.warn(
            f"{directory} held spectra of an earlier run that is not resumed: they are "
            f"now in {set_aside(directory)}.",
            stacklevel=4,
        )
        return
    for spectrum in load_spectra(directory):
        if spectrum.model_sketch != sketch:
            raise ValueError(
                f"{directory} holds spectra of {_words(spectrum.model_sketch)}, but "
                f"this run has {_words(sketch)}. Pass the settings of the run that you "
                "resume, or another output_dir."
            )
        if spectrum.step > step:
            for ending in ("json", "safetensors"):
                (directory / f"step-{spectrum.step:08d}.{ending}").unlink()


def _words(sketch: ModelSketch) -> str:
    """Describe a sketch in an error."""
    settings = ("out_size", "operator", "layout", "seed")
    return f"{len(sketch.shapes)} parameters with {sketch.in_size} elements, " + (
        ", ".join(f"{name}={getattr(sketch, name)!r}" for name in settings)
    )


def _summary(spectrum: Spectrum) -> dict[str, Any]:
    """Return the statistics for readers of the JSON file, which has no nan or inf."""
    names = ("rneg", "outliers", "alignment")
    ratios: dict[str, float] = {name: getattr(spectrum, name) for name in names}
    return {
        "eigenvalues": spectrum.eigenvalues.tolist(),
        "standard_errors": spectrum.standard_errors.tolist(),
        "trace": dataclasses.asdict(spectrum.trace),
        "shift": spectrum.shift,
        **{name: x if math.isfinite(x) else None for name, x in ratios.items()},
    }
