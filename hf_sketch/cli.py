"""The command `hf-sketch`."""

import argparse
from collections.abc import Sequence

from transformers import HfArgumentParser

# The folder is mapped into the package when it is installed, which pyright cannot see.
from hf_sketch.recipes.demo import (  # pyright: ignore[reportMissingImports]
    DemoArguments,
    run_demo,
)

_COMMANDS = {"demo": (DemoArguments, run_demo)}


def main(words: Sequence[str] | None = None) -> None:
    """Run a subcommand of `hf-sketch`.

    Args:
        words: what follows the command's name; by default what the shell gave.
    """
    parser = argparse.ArgumentParser("hf-sketch", description=__doc__)
    commands = parser.add_subparsers(
        dest="command", required=True, parser_class=HfArgumentParser
    )
    for name, (arguments, _) in _COMMANDS.items():
        commands.add_parser(name, dataclass_types=arguments, help=arguments.__doc__)
    given = vars(parser.parse_args(words))
    arguments, run = _COMMANDS[given.pop("command")]
    run(arguments(**given))
