"""Checks of settings: one sentence says what may be passed, and what was."""

import math
from collections.abc import Collection


def check_setting(setting: str, fits: bool, allowed: str, value: object) -> None:
    """Raise unless a setting fits.

    Args:
        setting: its name.
        fits: whether it does.
        allowed: what may be passed, as it follows "must be".
        value: what was passed.

    Raises:
        ValueError: it does not fit.
    """
    if not fits:
        raise ValueError(f"{setting} must be {allowed}, got {value!r}.")


def check_choice(setting: str, value: object, choices: Collection[str]) -> None:
    """Raise unless a setting has one of the values that it can take.

    Raises:
        ValueError: it has another.
    """
    known = f"one of {', '.join(map(repr, choices))}"
    check_setting(setting, isinstance(value, str) and value in choices, known, value)


def check_flag(setting: str, value: object, *, or_count: bool = False) -> None:
    """Raise unless a setting is True or False, or a count where that is allowed.

    Raises:
        ValueError: it is neither.
    """
    fits = isinstance(value, bool) or (or_count and _is_count(value, 1))
    allowed = "True, False or an integer of at least 1" if or_count else "True or False"
    check_setting(setting, fits, allowed, value)


def check_text(setting: str, value: object) -> None:
    """Raise unless a setting is a string.

    Raises:
        ValueError: it is not.
    """
    check_setting(setting, isinstance(value, str), "a string", value)


def check_count(
    setting: str, value: object, least: int = 1, *, optional: bool = False
) -> None:
    """Raise unless a setting is an integer, no bool, and large enough.

    Raises:
        ValueError: it is not, and neither is it None where that is allowed.
    """
    allowed = f"an integer of at least {least}{' or None' * optional}"
    fits = _is_count(value, least) or (optional and value is None)
    check_setting(setting, fits, allowed, value)


def check_counts(setting: str, values: object, least: int = 1) -> None:
    """Raise unless a setting is a list, or another collection, of such integers.

    Raises:
        ValueError: it is not.
    """
    fits = (
        isinstance(values, Collection)
        and not isinstance(values, str | bytes)
        and all(_is_count(value, least) for value in values)
    )
    check_setting(setting, fits, f"a list of integers of at least {least}", values)


def check_number(
    setting: str, value: object, least: float = -math.inf, *, optional: bool = False
) -> None:
    """Raise unless a setting is a finite number, no bool, and large enough.

    Raises:
        ValueError: it is not, and neither is it None where that is allowed.
    """
    at_least = "" if least == -math.inf else f" of at least {least:g}"
    allowed = f"a finite number{at_least}{' or None' * optional}"
    fits = _is_number(value, least) or (optional and value is None)
    check_setting(setting, fits, allowed, value)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and _is_number(value, least)


def _is_number(value: object, least: float) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) and value >= least
