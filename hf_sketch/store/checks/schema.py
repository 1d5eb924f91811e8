"""What JSON files of a store may say: rules that name the field that breaks them."""

import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

# A rule takes a field's path, as in "shards[0]", and its value; it raises ValueError.
Rule = Callable[[str, Any], None]

STEPS: Final = 2**31 - 1  # the column `step` is int32
PROCESSES: Final = 2**16
BYTES: Final = 2**53
_DIGEST: Final = re.compile("[0-9a-f]{32}")


def check_content(path: Path, content: object, rule: Rule, fix: str) -> None:
    """Raise unless a file's content keeps a rule.

    Raises:
        ValueError: it does not; the error names the file and the field.
    """
    try:
        rule("", content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}. {fix}") from None


def whole(low: int, high: int) -> Rule:
    """Return the rule of a whole number within bounds."""

    def check(field: str, value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            _refuse(field, value, f"a whole number from {low} to {high}")

    return check


def number(field: str, value: Any) -> None:
    """Take any number."""
    if type(value) is not float and (type(value) is not int or abs(value) > BYTES):
        _refuse(field, value, "a number")


def flag(field: str, value: Any) -> None:
    """Take true and false."""
    if type(value) is not bool:
        _refuse(field, value, "true or false")


def text(field: str, value: Any) -> None:
    """Take a string."""
    if type(value) is not str:
        _refuse(field, value, "a text")


def digest(field: str, value: Any) -> None:
    """Take a checksum."""
    if type(value) is not str or not _DIGEST.fullmatch(value):
        _refuse(field, value, "a checksum of 32 hexadecimal digits")


def one_of(*choices: str) -> Rule:
    """Return the rule of one of some strings."""

    def check(field: str, value: Any) -> None:
        if type(value) is not str or value not in choices:
            _refuse(field, value, f"one of {choices}")

    return check


def nullable(rule: Rule) -> Rule:
    """Return the rule of null or what another rule takes."""

    def check(field: str, value: Any) -> None:
        if value is not None:
            rule(field, value)

    return check


def many(rule: Rule, most: int = BYTES) -> Rule:
    """Return the rule of a list whose members all keep another rule."""

    def check(field: str, value: Any) -> None:
        if type(value) is not list or len(value) > most:
            _refuse(field, value, f"a list of at most {most}")
        for place, member in enumerate(value):
            rule(f"{field}[{place}]", member)

    return check


def row(*rules: Rule) -> Rule:
    """Return the rule of a list with a member for each of some rules."""

    def check(field: str, value: Any) -> None:
        if type(value) is not list or len(value) != len(rules):
            _refuse(field, value, f"a list of {len(rules)}")
        for place, member in enumerate(value):
            rules[place](f"{field}[{place}]", member)

    return check


def record(
    required: Mapping[str, Rule],
    optional: Mapping[str, Rule] | None = None,
    closed: bool = True,
) -> Rule:
    """Return the rule of an object.

    Args:
        required: the rules of fields that are there.
        optional: checks of fields that may be absent.
        closed: other fields are refused; later releases may add them otherwise.
    """
    rules = {**required, **(optional or {})}

    def check(field: str, value: Any) -> None:
        if type(value) is not dict:
            _refuse(field, value, "an object")
        if lacking := required.keys() - value.keys():
            raise ValueError(f"{_at(field, min(lacking))} is missing")
        for name, member in value.items():
            if name in rules:
                rules[name](_at(field, name), member)
            elif closed:
                raise ValueError(f"{_at(field, reprlib.repr(name))} is unknown")

    return check


def _at(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name


def _refuse(field: str, value: object, what: str) -> None:
    raise ValueError(f"{field or 'the content'} is {reprlib.repr(value)}, not {what}")
