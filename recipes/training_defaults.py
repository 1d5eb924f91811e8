"""The Trainer's arguments with the defaults of a recipe."""

import dataclasses
from collections.abc import Mapping
from typing import Any


def with_defaults(
    base: type, defaults: Mapping[str, Any], name: str, module: str
) -> Any:
    """Return a subclass of a dataclass of arguments, with other defaults.

    Args:
        base: `TrainingArguments` or a subclass.
        defaults: new default of each field that has one; its help text stays.
        name: name of the new class.
        module: where the class is a global of that name, so that it can be pickled.
    """
    known = {field.name: field for field in dataclasses.fields(base)}
    changed = [
        (field, known[field].type, _with_default(known[field], value))
        for field, value in defaults.items()
    ]
    namespace = {"__module__": module, "__doc__": f"{base.__name__} of a recipe."}
    return dataclasses.make_dataclass(name, changed, bases=(base,), namespace=namespace)


def with_small(arguments: Any, small: Mapping[str, Any]) -> Any:
    """Return the arguments with small settings where they are still the default."""
    defaults = {field.name: field.default for field in dataclasses.fields(arguments)}
    return dataclasses.replace(
        arguments,
        **{
            name: value
            for name, value in small.items()
            if getattr(arguments, name) == defaults[name]
        },
    )


def _with_default(field: "dataclasses.Field[Any]", value: Any) -> Any:
    return dataclasses.field(default=value, metadata=field.metadata)
