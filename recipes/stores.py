"""The commands that take recorded directories."""

import importlib
from pathlib import Path
from typing import Any

from hf_sketch import load_sketches, load_spectra, load_updates, verify_training
from hf_sketch.recipes.options.stores import (
    CompactArguments,
    ExportArguments,
    InfoArguments,
    MergeArguments,
    RepairArguments,
    ReportArguments,
    SpectrumArguments,
    UpgradeArguments,
    UploadArguments,
    VerifyArguments,
)
from hf_sketch.recipes.spectrum_report import print_spectra, summary_of
from hf_sketch.report.page import write_report
from hf_sketch.store.compaction import compact
from hf_sketch.store.contents import describe, inventory
from hf_sketch.store.export import export_sketches
from hf_sketch.store.locations import is_remote, store_directory
from hf_sketch.store.maintenance import find_problems, merge, repair, upgrade
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP, UPDATE
from hf_sketch.store.upload import upload_store


def run_info(arguments: InfoArguments, directories: list[str]) -> list[dict[str, Any]]:
    """Print and return what is in each store."""
    stores = [store_directory(directory) for directory in directories]
    for store in stores:
        print(describe(store))
    return [inventory(store) for store in stores]


def run_verify(arguments: VerifyArguments, directories: list[str]) -> list[str]:
    """Print and return what is wrong with each store."""
    ends = arguments.from_checkpoint, arguments.to_checkpoint
    if (None in ends) != (ends == (None, None)) or (ends[0] and directories[1:]):
        raise ValueError(
            f"verify takes --from and --to together, with one DIR. Got {ends[0]!r}, "
            f"{ends[1]!r} and {len(directories)} DIR."
        )
    problems = [p for d in directories for p in find_problems(store_directory(d))]
    print("\n".join(problems) or "nothing differs from what was written")
    if ends[0] is not None and ends[1] is not None and not problems:
        check = verify_training(directories[0], *ends)
        print(check)
        problems += check.problems
    return problems


def run_repair(arguments: RepairArguments, directories: list[str]) -> None:
    """Repair each store and print how."""
    stores = _stores_here("repair", directories)
    done = [line for store in stores for line in repair(store)]
    print("\n".join(done) or "there was nothing to mend")


def run_upgrade(arguments: UpgradeArguments, directories: list[str]) -> None:
    """Bring each store to the newest version of the format and print how."""
    stores = _stores_here("upgrade", directories)
    done = [line for store in stores for line in upgrade(store)]
    print("\n".join(done) or "the format was the newest one")


def run_compact(arguments: CompactArguments, directories: list[str]) -> None:
    """Join the small files of each store and print how many are left."""
    stores = _stores_here("compact", directories)
    done = [line for store in stores for line in compact(store)]
    print("\n".join(done) or "there were no small files to join")


def run_merge(arguments: MergeArguments, directories: list[str]) -> None:
    """Merge the stores and describe the result."""
    output = Path(arguments.output_dir)
    merge([store_directory(directory) for directory in directories], output)
    print(describe(output))


def run_export(arguments: ExportArguments, directories: list[str]) -> None:
    """Export the store and print the names of the files."""
    if len(directories) != 1:
        raise ValueError(
            f"export takes one store, got {len(directories)}: join them with hf-sketch "
            "merge."
        )
    sketches = load_sketches(directories[0])
    rows = {
        PER_EXAMPLE: sketches.dataset,
        PER_STEP: sketches.steps,
        UPDATE: load_updates(directories[0]),
    }
    for path in export_sketches(rows, arguments.to, Path(arguments.output_dir)):
        print(path)


def run_upload(arguments: UploadArguments, directories: list[str]) -> None:
    """Upload the store and print how many files of rows were sent."""
    if len(directories) != 1:
        raise ValueError(
            f"upload takes one store, got {len(directories)}: call it for each."
        )
    sent = upload_store(store_directory(directories[0]), arguments.url)
    print(f"sent {len(sent)} files of rows to {arguments.url}")


def run_spectrum(
    arguments: SpectrumArguments, directories: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """Print and return the spectra of each run, and plot all of them in one figure."""
    spectra = {directory: load_spectra(directory) for directory in directories}
    for directory, found in spectra.items():
        print(directory)
        print_spectra(found)
    if arguments.plot is not None:
        plots = importlib.import_module("hf_sketch.report.plots")
        plots.plot_figure_2(spectra).savefig(arguments.plot)
        print(f"saved {arguments.plot}")
    return {name: [summary_of(x) for x in found] for name, found in spectra.items()}


def run_report(arguments: ReportArguments, directories: list[str]) -> None:
    """Write one page per run."""
    if arguments.output_file is not None and len(directories) != 1:
        raise ValueError(
            f"output_file is for one DIR, got {len(directories)}: leave it out, and "
            "each gets its own report.html."
        )
    for directory in directories:
        print(f"saved {write_report(directory, arguments.output_file)}")


def _stores_here(command: str, directories: list[str]) -> list[Path]:
    """The stores that a command changes, which must be on this machine."""
    if remote := [directory for directory in directories if is_remote(directory)]:
        raise ValueError(
            f"{command} takes directories, got {remote}. Change a copy of the store, "
            "and put that in its place."
        )
    return [store_directory(directory) for directory in directories]
