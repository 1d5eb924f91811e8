"""Smaller settings, for a recipe's run of minutes."""

import dataclasses
from typing import Any, TypeVar

Arguments = TypeVar("Arguments")


def with_small(arguments: Arguments, small: dict[str, Any]) -> Arguments:
    """Small settings in the place of those that are still the default."""
    defaults = {f.name: f.default for f in dataclasses.fields(arguments)}
    return dataclasses.replace(
        arguments,
        **{
            name: value
            for name, value in small.items()
            if getattr(arguments, name) == defaults[name]
        },
    )
