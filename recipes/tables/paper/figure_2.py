"""Figure 2: RNEG over training steps, and the ratios of positive eigenvalues."""

from dataclasses import dataclass, field
from typing import Any

from transformers import HfArgumentParser

from hf_sketch import Spectrum, load_spectra
from hf_sketch.recipes.saved_report import save_report
from hf_sketch.recipes.spectrum_report import (
    plots_if_installed,
    print_spectra,
    summary_of,
)


@dataclass
class Figure2Arguments:
    """Plot runs of `hf-sketch hessian` as in the paper's Figure 2."""

    runs: str = field(
        metadata={"help": "name=output_dir of each run, with commas between them."}
    )
    output_dir: str = field(
        default="out/tables", metadata={"help": "Directory for the JSON and the plots."}
    )


def load_runs(runs: str) -> dict[str, list[Spectrum]]:
    """The spectra of each run, by name.

    Raises:
        FileNotFoundError: a directory has no spectra.
        ValueError: a run has no name or no directory, or two have the same name.
    """
    spectra: dict[str, list[Spectrum]] = {}
    for run in runs.split(","):
        name, _, directory = run.partition("=")
        if not name or not directory or name in spectra:
            raise ValueError(
                "runs must be name=output_dir with commas between them, each name "
                f"once, got {run!r} in {runs!r}: pass --runs a=out/a,b=out/b."
            )
        spectra[name] = load_spectra(directory)
    return spectra


def run_figure_2(arguments: Figure2Arguments) -> dict[str, list[dict[str, Any]]]:
    """Print each run beside what the paper says, save, and plot with matplotlib."""
    spectra_by_name = load_runs(arguments.runs)
    for name, spectra in spectra_by_name.items():
        print(name)
        print_spectra(spectra)
    print(
        "the paper's, in words: RNEG stays higher for Roberta on SNLI and diminishes "
        "for GPT-2L and BART;\n  6 outliers for Roberta, not 3 classes less one; "
        "alignment 27% for Roberta, 35% for GPT-2L, 8% for BART"
    )
    results = {
        name: [{**summary_of(s), "ratios": s.ratios.tolist()} for s in spectra]
        for name, spectra in spectra_by_name.items()
    }
    path = save_report(arguments.output_dir, "figure_2", arguments, results)
    print("saved", path)
    plots = plots_if_installed()
    if plots is not None:
        figure = plots.plot_figure_2(spectra_by_name)
        for ending in (".svg", ".png"):
            figure.savefig(path.with_suffix(ending), dpi=150)
            print("saved", path.with_suffix(ending))
    return results


if __name__ == "__main__":
    run_figure_2(*HfArgumentParser(Figure2Arguments).parse_args_into_dataclasses())
