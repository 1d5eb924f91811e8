"""The rules of the house that a machine can check."""

import ast
import re
from pathlib import Path

import pytest

import hf_sketch
import hf_sketch.callbacks

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("hf_sketch", "callbacks", "recipes")
    for path in (ROOT / folder).rglob("*.py")
)
FILES = SOURCES + sorted((ROOT / "tests").rglob("*.py"))
TOP_LEVEL = {
    "pyproject.toml",
    "hf_sketch",
    "callbacks",
    "tests",
    "recipes",
    "docs",
    "README.md",
    "LICENSE",
}

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)


def test_the_sources_are_found():
    assert {"affd", "gradient", "demo"} <= {path.stem for path in SOURCES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_have_a_name_that_says_something_and_at_most_300_lines(path):
    assert path.stem not in {"utils", "common", "misc", "helpers", "util"}
    limit = 300 if path in SOURCES else 400
    assert len(path.read_text().splitlines()) <= limit


@each_source
def test_functions_have_at_most_40_lines_of_code(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) is not None
            start = node.body[0].end_lineno if documented else node.lineno
            assert node.end_lineno - start <= 40, node.name


@each_source
def test_there_is_no_module_level_state_nor_broad_except(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Global)
        if isinstance(node, ast.ExceptHandler):
            names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            assert not names & {"Exception", "BaseException"}


@each_source
def test_no_device_is_named(path):
    assert not re.search(r"\.cuda\(|[\"']cuda", path.read_text())


@each_source
def test_only_what_builds_on_transformers_imports_it(path):
    """Callbacks, recipes, the command line and the PEFT method."""
    relative = path.relative_to(ROOT)
    builds = relative.name == "cli.py" or relative.name.startswith("subspace")
    if relative.parts[0] == "hf_sketch" and not builds:
        assert not re.search(
            r"^\s*(from|import) (transformers|peft)", path.read_text(), re.M
        )


def test_the_top_level_is_what_it_should_be():
    ignored = {"__pycache__", "build", "dist", "out"}
    found = {
        path.name
        for path in ROOT.iterdir()
        if not path.name.startswith(".") and not path.name.endswith(".egg-info")
    }
    assert found - ignored == TOP_LEVEL


def public_names():
    return [
        *hf_sketch.__all__,
        *(f"callbacks.{name}" for name in hf_sketch.callbacks.__all__),
    ]


def test_every_public_name_has_an_entry_in_the_reference():
    page = (ROOT / "docs" / "reference.md").read_text()
    entries = re.findall(r"^### `([\w.]+)", page, re.M)
    assert sorted(entries) == sorted(f"hf_sketch.{name}" for name in public_names())


def test_every_public_name_has_a_docstring():
    for name in public_names():
        owner, _, attribute = name.rpartition(".")
        module = hf_sketch.callbacks if owner else hf_sketch
        assert getattr(module, attribute).__doc__, name
