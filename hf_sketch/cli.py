"""The command `hf-sketch`."""

import argparse
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hf_sketch.attribution.loading import load_sketches
from hf_sketch.processes import (
    end_group,
)
from hf_sketch.recipes.attribute import (  # pyright: ignore[reportMissingImports]
    AttributeArguments,
    run_attribute,
)
from hf_sketch.recipes.demo import (  # pyright: ignore[reportMissingImports]
    DemoArguments,
    run_demo,
)
from hf_sketch.recipes.hessian import (  # pyright: ignore[reportMissingImports]
    HessianArguments,
    HessianTrainingArguments,
    run_hessian,
)
from hf_sketch.recipes.plan import PlanArguments, run_plan  # pyright: ignore[reportMissingImports]
from hf_sketch.recipes.snli import (  # pyright: ignore[reportMissingImports]
    SnliArguments,
    SnliTrainingArguments,
    run_snli,
)
from hf_sketch.recipes.spectrum_report import (  # pyright: ignore[reportMissingImports]
    print_spectra,
)
from hf_sketch.recipes.wikitext import (  # pyright: ignore[reportMissingImports]
    AttributionArguments,
    AttributionTrainingArguments,
    run_attribution,
)
from hf_sketch.recipes.xsum import (  # pyright: ignore[reportMissingImports]
    XsumArguments,
    XsumTrainingArguments,
    run_xsum,
)
from hf_sketch.report.page import write_report
from hf_sketch.spectra.files import load_spectra
from hf_sketch.store.export import export_sketches
from hf_sketch.store.hub import store_directory
from hf_sketch.store.maintenance import describe, find_problems, merge, repair
from hf_sketch.store.remote import is_remote


@dataclass
class InfoArguments:
    """Tell what is in a store."""


@dataclass
class VerifyArguments:
    """Compare every byte of a store with its digest; exit with 1 if one differs."""


@dataclass
class RepairArguments:
    """Set damaged files of a store aside, so that it opens again."""


@dataclass
class MergeArguments:
    """Copy stores of one map, as of several machines, into one."""

    output_dir: str = field(metadata={"help": "The new store; must not be there."})


@dataclass
class ExportArguments:
    """Copy the rows of a store to files of another format."""

    to: str = field(metadata={"help": "parquet, npy or safetensors."})
    output_dir: str = field(metadata={"help": "A new directory for the files."})


@dataclass
class SpectrumArguments:
    """Print the Hessian's spectra that a run recorded, and draw them if asked."""

    plot: str | None = field(
        default=None,
        metadata={"help": "A .svg, .png or .pdf file for RNEG and R(n), as Figure 2."},
    )


@dataclass
class ReportArguments:
    """Write one HTML page of all that was recorded: it opens without a network.

    It shows the sketches, what hf-sketch attribute answered, spectra and the search for
    the intrinsic dimension, each if it is there.
    """

    output_file: str | None = field(
        default=None, metadata={"help": "The page; by default DIR/report.html."}
    )


def run_info(arguments: InfoArguments, directories: list[str]) -> None:
    """Print what is in each store."""
    for directory in directories:
        print(describe(store_directory(directory)))


def run_verify(arguments: VerifyArguments, directories: list[str]) -> None:
    """Print what is wrong with each store."""
    problems = [p for d in directories for p in find_problems(store_directory(d))]
    print("\n".join(problems) or "nothing differs from what was written")
    if problems:
        raise SystemExit(1)


def run_repair(arguments: RepairArguments, directories: list[str]) -> None:
    """Mend each store and print how."""
    if remote := [directory for directory in directories if is_remote(directory)]:
        raise ValueError(
            f"repair takes directories, got {remote}: mend a copy of it, and put that "
            "in its place."
        )
    done = [line for d in directories for line in repair(store_directory(d))]
    print("\n".join(done) or "there was nothing to mend")


def run_merge(arguments: MergeArguments, directories: list[str]) -> None:
    """Join the stores and print what came out."""
    output = Path(arguments.output_dir)
    merge([store_directory(directory) for directory in directories], output)
    print(describe(output))


def run_export(arguments: ExportArguments, directories: list[str]) -> None:
    """Export the store and print the files."""
    if len(directories) != 1:
        raise ValueError(
            f"export takes one store, got {len(directories)}: join them with hf-sketch "
            "merge."
        )
    sketches = load_sketches(directories[0])
    for path in export_sketches(sketches, arguments.to, Path(arguments.output_dir)):
        print(path)


def run_spectrum(arguments: SpectrumArguments, directories: list[str]) -> None:
    """Print the spectra of each run, and draw all of them in one picture."""
    spectra = {directory: load_spectra(directory) for directory in directories}
    for directory, found in spectra.items():
        print(directory)
        print_spectra(found)
    if arguments.plot is not None:
        plots = importlib.import_module("hf_sketch.report.plots")
        plots.plot_figure_2(spectra).savefig(arguments.plot)
        print(f"saved {arguments.plot}")


def run_report(arguments: ReportArguments, directories: list[str]) -> None:
    """Write a page for each run."""
    if arguments.output_file is not None and len(directories) != 1:
        raise ValueError(
            f"output_file is for one DIR, got {len(directories)}: leave it out, and "
            "each gets its own report.html."
        )
    for directory in directories:
        print(f"saved {write_report(directory, arguments.output_file)}")


@dataclass(frozen=True)
class _Command:
    """A subcommand.

    Args:
        arguments: dataclass of its options; its docstring is the help.
        run: called with them, with those of the Trainer if it takes some, and with a
            list of directories if it takes stores.
        takes_stores: whether it does.
        training: dataclass of the Trainer's options.
    """

    arguments: type
    run: Callable[..., Any]
    takes_stores: bool = True
    training: type | None = None

    @property
    def dataclasses(self) -> list[type]:
        """Of all its options."""
        return [kind for kind in (self.arguments, self.training) if kind is not None]


_COMMANDS = {
    "demo": _Command(DemoArguments, run_demo, takes_stores=False),
    "attribution": _Command(
        AttributionArguments,
        run_attribution,
        takes_stores=False,
        training=AttributionTrainingArguments,
    ),
    "hessian": _Command(
        HessianArguments,
        run_hessian,
        takes_stores=False,
        training=HessianTrainingArguments,
    ),
    "snli": _Command(
        SnliArguments, run_snli, takes_stores=False, training=SnliTrainingArguments
    ),
    "xsum": _Command(
        XsumArguments, run_xsum, takes_stores=False, training=XsumTrainingArguments
    ),
    "plan": _Command(PlanArguments, run_plan, takes_stores=False),
    "attribute": _Command(AttributeArguments, run_attribute),
    "spectrum": _Command(SpectrumArguments, run_spectrum),
    "report": _Command(ReportArguments, run_report),
    "info": _Command(InfoArguments, run_info),
    "verify": _Command(VerifyArguments, run_verify),
    "repair": _Command(RepairArguments, run_repair),
    "merge": _Command(MergeArguments, run_merge),
    "export": _Command(ExportArguments, run_export),
}


def main(words: Sequence[str] | None = None) -> None:
    """Run a subcommand of `hf-sketch`.

    Args:
        words: what follows the command's name; by default what the shell gave.
    """
    parser = argparse.ArgumentParser("hf-sketch", description=__doc__)
    commands = parser.add_subparsers(
        dest="command", required=True, parser_class=HfArgumentParser
    )
    for name, command in _COMMANDS.items():
        help_text = command.arguments.__doc__
        sub = commands.add_parser(
            name,
            dataclass_types=command.dataclasses,
            help=help_text,
            description=help_text,
        )
        if command.takes_stores:
            what = "An output_dir of a Trainer or the sketches in it, or its URL."
            sub.add_argument("directories", nargs="+", metavar="DIR", help=what)
    given = vars(parser.parse_args(words))
    command = _COMMANDS[given.pop("command")]
    stores = [given.pop("directories")] if command.takes_stores else []
    command.run(*(_filled(kind, given) for kind in command.dataclasses), *stores)
    end_group()


def _filled(kind: type, given: Mapping[str, Any]) -> Any:
    """A dataclass with those of the options that are its own."""
    return kind(**{f.name: given[f.name] for f in fields(kind) if f.init})


if __name__ == "__main__":
    main()
