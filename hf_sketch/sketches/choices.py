"""Settings that take one of a few words."""

from collections.abc import Collection


def check_choice(setting: str, value: object, choices: Collection[str]) -> None:
    """Raise unless a setting has one of the values that it can take.

    Raises:
        ValueError: it has another.
    """
    if value not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"{setting} must be one of {known}, got {value!r}.")


def check_count(setting: str, value: object, least: int = 1) -> None:
    """Raise unless a setting is an integer, no bool, and large enough.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{setting} must be an integer of at least {least}, got {value!r}."
        )
