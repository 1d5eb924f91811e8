"""Record, maintain and query gradient sketches: the command `hf-sketch`."""

import argparse
import importlib
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.metadata import version
from typing import Any, NoReturn

from transformers import HfArgumentParser

_HELP = {"-h", "--help"}
_ALL_HELP = "--help_all"


@dataclass(frozen=True)
class _Command:
    """A subcommand, by the names of what it consists of; modules load when needed.

    Args:
        options: module and class of its options; the docstring is the help.
        run: module and function, called with the options, with those of the Trainer if
            it takes some, and with a list of directories if it takes stores.
        takes_stores: whether it does.
        training: module and class of the Trainer's options.
        defaults: module and mapping of those with a default of the command's own.
        prints: whether its result is what it prints: --json and --quiet change that.
        is_check: whether a result that is not empty is a failure, with exit status 1.
    """

    options: str
    run: str
    takes_stores: bool = False
    training: str | None = None
    defaults: str | None = None
    prints: bool = False
    is_check: bool = False


_OPTIONS, _RECIPES = "hf_sketch.recipes.options", "hf_sketch.recipes"
_COMMANDS = {
    "demo": _Command(f"{_OPTIONS}.demo:DemoArguments", f"{_RECIPES}.demo:run_demo"),
    "wikitext": _Command(
        f"{_OPTIONS}.wikitext:WikitextArguments",
        f"{_RECIPES}.wikitext:run_wikitext",
        training=f"{_RECIPES}.wikitext:WikitextTrainingArguments",
        defaults=f"{_OPTIONS}.wikitext:WIKITEXT_TRAINING",
    ),
    "hessian": _Command(
        f"{_OPTIONS}.hessian:HessianArguments",
        f"{_RECIPES}.hessian:run_hessian",
        training=f"{_RECIPES}.hessian:HessianTrainingArguments",
        defaults=f"{_OPTIONS}.hessian:HESSIAN_TRAINING",
    ),
    "snli": _Command(
        f"{_OPTIONS}.dimension:SnliArguments",
        f"{_RECIPES}.snli:run_snli",
        training=f"{_RECIPES}.snli:SnliTrainingArguments",
        defaults=f"{_OPTIONS}.dimension:SNLI_TRAINING",
    ),
    "xsum": _Command(
        f"{_OPTIONS}.dimension:XsumArguments",
        f"{_RECIPES}.xsum:run_xsum",
        training=f"{_RECIPES}.xsum:XsumTrainingArguments",
        defaults=f"{_OPTIONS}.dimension:XSUM_TRAINING",
    ),
    "plan": _Command(f"{_OPTIONS}.plan:PlanArguments", f"{_RECIPES}.plan:run_plan"),
    "attribute": _Command(
        f"{_OPTIONS}.attribute:AttributeArguments",
        f"{_RECIPES}.attribute:run_attribute",
        takes_stores=True,
        prints=True,
    ),
    "audit": _Command(
        f"{_OPTIONS}.audit:AuditArguments",
        f"{_RECIPES}.questions.audit:run_audit",
        takes_stores=True,
        prints=True,
    ),
    "select": _Command(
        f"{_OPTIONS}.select:SelectArguments",
        f"{_RECIPES}.questions.select:run_select",
        training=f"{_RECIPES}.questions.select:SelectTrainingArguments",
        defaults=f"{_OPTIONS}.select:SELECT_TRAINING",
    ),
    "spikes": _Command(
        f"{_OPTIONS}.spikes:SpikesArguments",
        f"{_RECIPES}.questions.spikes:run_spikes",
        takes_stores=True,
        prints=True,
    ),
    **{
        name: _Command(
            f"{_OPTIONS}.stores:{name.title()}Arguments",
            f"{_RECIPES}.stores:run_{name}",
            takes_stores=True,
            prints=name in ("spectrum", "info", "verify"),
            is_check=name == "verify",
        )
        for name in (
            "spectrum",
            "report",
            "info",
            "verify",
            "repair",
            "upgrade",
            "compact",
            "merge",
            "export",
            "upload",
        )
    },
}
_RENAMED = {"attribution": "wikitext"}


class _Parser(HfArgumentParser):
    """Answers a wrong command line in one line; the usage of some fills a page."""

    def error(self, message: str) -> NoReturn:
        hint = f"Run `{self.prog} --help` for the options."
        self.exit(2, f"{self.prog}: {message}. {hint}\n")


def console() -> None:
    """Run `main` as a command: an expected error is one line and exit status 2."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nhf-sketch: interrupted; what was written is kept.", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print("hf-sketch:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


def main(words: Sequence[str] | None = None) -> None:
    """Run a subcommand of `hf-sketch`.

    Args:
        words: the command line after the program's name; the shell's by default.
    """
    words = list(sys.argv[1:] if words is None else words)
    if words and words[0] in _RENAMED:
        new = _RENAMED[words[0]]
        print(f"hf-sketch {words[0]} is now hf-sketch {new}.", file=sys.stderr)
        words[0] = new
    given = vars(_parser(words).parse_args(words))
    command = _COMMANDS[given.pop("command")]
    stores = [given.pop("directories")] if command.takes_stores else []
    as_json, quiet = (given.pop(name, False) for name in ("json", "quiet"))
    kinds = [_load(name) for name in (command.options, command.training) if name]
    shown = io.StringIO() if as_json or quiet else sys.stdout
    with redirect_stdout(shown):
        result = _load(command.run)(*(_filled(kind, given) for kind in kinds), *stores)
    if as_json and _load("hf_sketch.processes:processes")().is_main_process:
        print(json.dumps(_in_json(result), indent=1))
    _load("hf_sketch.processes:end_group")()
    if command.is_check and result:
        raise SystemExit(1)


def _in_json(value: Any) -> Any:
    """Return a result as what JSON has, which knows no NaN and no infinity."""
    if is_dataclass(value) and not isinstance(value, type):
        return _in_json(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): _in_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands; the Trainer's options are added to the chosen one.

    They take seconds to import, so `--help` names only those with a new default.
    """
    parser = _Parser(
        prog="hf-sketch", description="Record, maintain and query gradient sketches."
    )
    parser.add_argument(
        "--version", action="version", version=f"hf-sketch {version('hf-sketch')}"
    )
    commands = parser.add_subparsers(
        dest="command", required=True, parser_class=_Parser
    )
    for name, command in _COMMANDS.items():
        kinds = [_load(command.options)]
        if command.training and [name] == words[:1] and not _HELP & set(words):
            kinds.append(_load(command.training))
        help_text = str(kinds[0].__doc__)
        sub = commands.add_parser(
            name,
            dataclass_types=kinds,
            help=help_text.partition("\n")[0],
            description=help_text,
            epilog=_training_help(command),
        )
        if command.training:
            what = "Also list all options of the Trainer, and exit."
            sub.add_argument(_ALL_HELP, action="help", help=what)
        if command.prints:
            output = sub.add_mutually_exclusive_group()
            what = "Print the result as JSON, and nothing else."
            output.add_argument("--json", action="store_true", help=what)
            what = "Print no result; warnings and errors go to stderr."
            output.add_argument("--quiet", action="store_true", help=what)
        if command.takes_stores:
            what = "A Trainer's output_dir, the sketches in it, or a URL of either."
            sub.add_argument("directories", nargs="+", metavar="DIR", help=what)
    return parser


def _training_help(command: _Command) -> str | None:
    """A sentence on the Trainer's options of a command that takes them."""
    if command.defaults is None:
        return None
    own = " ".join(
        f"--{name} {value}" for name, value in _load(command.defaults).items()
    )
    return (
        "All options of transformers.TrainingArguments are accepted as well "
        f"({_ALL_HELP} lists them). Other defaults than the Trainer's: {own}."
    )


def _load(name: str) -> Any:
    """The object of a module's and an attribute's name."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _filled(kind: type, given: Mapping[str, Any]) -> Any:
    """A dataclass filled with those of the options that are its own."""
    return kind(**{f.name: given[f.name] for f in fields(kind) if f.init})


if __name__ == "__main__":
    console()
