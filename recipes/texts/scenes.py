"""Words for sentences about people, written for this project."""

import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any, TypeVar

from hf_sketch import CounterRandom

Choice = TypeVar("Choice")


def scenes() -> dict[str, Any]:
    """Return the words, by what they say of a person."""
    path = files("hf_sketch.recipes").joinpath("data", "scenes.json")
    return json.loads(path.read_text(encoding="utf-8"))


def fixed_numbers(purpose: str, count: int) -> Iterator[int]:
    """Return random numbers that are the same each time."""
    return iter(CounterRandom(0, purpose).words(0, count).tolist())


def pick(options: Sequence[Choice], numbers: Iterator[int]) -> Choice:
    """Choose one by the next number."""
    return options[next(numbers) % len(options)]


def taken(options: list[Choice], numbers: Iterator[int]) -> Choice:
    """Take one out by the next number."""
    return options.pop(next(numbers) % len(options))


def with_article(words: str) -> str:
    """Put a or an before words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def sentence(text: str) -> str:
    """Begin with a capital letter and end with a full stop."""
    return f"{text[0].upper()}{text[1:]}."
