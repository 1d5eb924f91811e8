"""Spectra as numbers, as a table and as pictures."""

import dataclasses
import importlib
import importlib.util
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from hf_sketch import Spectrum

_KEPT = 20
_PRINTED = 5


def summary_of(spectrum: Spectrum) -> dict[str, Any]:
    """What a report keeps of a spectrum; no RNEG is None."""
    return {
        "step": spectrum.step,
        "loss": spectrum.loss,
        "top_eigenvalues": spectrum.eigenvalues.flip(0)[:_KEPT].tolist(),
        "standard_errors": spectrum.standard_errors.flip(0)[:_KEPT].tolist(),
        "least_eigenvalue": float(spectrum.eigenvalues[0]),
        "rneg": spectrum.rneg if math.isfinite(spectrum.rneg) else None,
        "outliers": spectrum.outliers,
        "alignment": spectrum.alignment,
        "trace": dataclasses.asdict(spectrum.trace),
        "krylov_dim": len(spectrum.sketched),
        "loss_of_orthogonality": spectrum.loss_of_orthogonality,
        "mode": spectrum.mode,
        "check": spectrum.check and dataclasses.asdict(spectrum.check),
    }


def print_spectra(spectra: Sequence[Spectrum]) -> None:
    """A line for each step."""
    width = 10 * _PRINTED - 1
    print(
        f"{'step':>6} {'loss':>8}  {'largest eigenvalues':{width}s}  {'RNEG':>6} "
        f"{'outliers':>8} {'alignment':>9}"
    )
    for spectrum in spectra:
        largest = spectrum.eigenvalues.flip(0)[:_PRINTED].tolist()
        values = " ".join(f"{value:9.4g}" for value in largest)
        print(
            f"{spectrum.step:6d} {spectrum.loss:8.4f}  {values:{width}s}  "
            f"{spectrum.rneg:6.3f} {spectrum.outliers:8d} {spectrum.alignment:9.1%}"
        )


def plots_if_installed() -> ModuleType | None:
    """hf_sketch.report.plots; None, and a line that says so, without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed, pip install 'hf-sketch[plot]'")
        return None
    return importlib.import_module("hf_sketch.report.plots")
