"""Every Python block of README, docs and CONTRIBUTING runs."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
HOME = "https://github.com/hf-sketch/hf-sketch/blob/main/"
PAGES = [
    README,
    ROOT / ".github" / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name
)
def test_the_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)


def test_ci_runs_the_test_line_of_the_readme():
    """What newcomers run is what has passed."""
    (line,) = re.findall(r"^(pip install .* && pytest)\b", README.read_text(), re.M)
    assert line in (ROOT / ".ci" / "run").read_text().splitlines()


def test_modules_that_pages_run_exist():
    named = {
        (page.name, module)
        for page in PAGES
        if page.name != "changelog.md"  # which names what was there before
        for module in re.findall(r"python\s+-m\s+([\w.]+\w)`?", page.read_text())
    }
    assert len(named) > 20
    assert [one for one in sorted(named) if find_spec(one[1]) is None] == []


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readmes_links_are_whole_since_package_indexes_show_it_too():
    targets = re.findall(r"\]\(([^)]+)\)", README.read_text())
    assert len(targets) > 20
    for target in targets:
        if target.startswith("https://img.shields.io/badge/"):
            continue  # a picture of its own address
        path = re.fullmatch(rf"{re.escape(HOME)}([^#?]+)([#?].*)?", target)
        assert path is not None, target
        assert (ROOT / path[1]).exists(), target
