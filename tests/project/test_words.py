"""Words that a reader must stumble over do not come back."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = ROOT / "recipes" / "texts"  # examples to train on
SOURCES = sorted(
    path
    for folder in ("hf_sketch", "callbacks", "recipes")
    for path in (ROOT / folder).rglob("*.py")
    if TEXTS not in path.parents
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DIALECT = re.compile(
    r"\b(told|tells(?! you)|anew|in vain|the mend|turned round|looks? after|hear of"
    r"|speaks? for"
    r"|so many|no more(?! (than|often|memory))"
    r"|(?<!twice )as many(?! [\w ]+ as\b| as\b))\b",
    re.I,
)
# An argument's text begins with what the argument is.
HEADLESS = re.compile(
    r"^ +(?!\w+(Error|Warning))\w+: (of|by|with|at|those|whose|that) "
    r"|\"help\": \"(Of|By|At|That|Those) ",
    re.M,
)


def strings_of(path):
    """Yield the strings of a file with their lines, docstrings and f-strings too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def words_of(path):
    """Yield the names and the docstrings of a file's functions and classes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name.replace("_", " ")
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            line = getattr(node, "lineno", 1)
            yield line, " ".join((ast.get_docstring(node) or "").split())


def found(pattern, texts):
    return [f"{where}: {m[0]}" for where, text in texts for m in pattern.finditer(text)]


@pytest.mark.parametrize("text", ["what it told", "of so many rows", "as many files"])
def test_dialect_is_recognized(text):
    assert found(DIALECT, [("here", text)])


@pytest.mark.parametrize("text", ["as many as", "as many rows as", "no more than two"])
def test_plain_english_passes(text):
    assert found(DIALECT, [("here", text)]) == []


def test_the_packages_strings_have_no_dialect():
    texts = (
        (f"{path.relative_to(ROOT)}:{line}", " ".join(text.split()))
        for path in SOURCES
        for line, text in strings_of(path)
    )
    assert found(DIALECT, texts) == []


def test_the_names_of_tests_have_no_dialect():
    texts = (
        (f"{path.relative_to(ROOT)}:{line}", text)
        for path in TESTS
        for line, text in words_of(path)
    )
    assert found(DIALECT, texts) == []


def test_the_pages_have_no_dialect():
    texts = (
        (f"{path.relative_to(ROOT)}:{number}", line)
        for path in PAGES
        for number, line in enumerate(path.read_text().splitlines(), 1)
    )
    assert found(DIALECT, texts) == []


def test_arguments_texts_begin_with_what_they_are():
    texts = ((path.relative_to(ROOT), path.read_text()) for path in SOURCES)
    assert found(HEADLESS, texts) == []
