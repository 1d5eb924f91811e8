"""The cells of each tutorial run, and print what the notebook shows."""

import json
import re
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"


def cells_of(path):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def printed_in(cell):
    """What the notebook shows that a cell printed."""
    streams = [o for o in cell["outputs"] if o["output_type"] == "stream"]
    return "".join("".join(output["text"]) for output in streams)


def printed_by(name, folder, monkeypatch, capsys):
    """Run a tutorial's cells, which print what the notebook shows; return that."""
    monkeypatch.chdir(folder)
    names, everything = {}, ""
    for number, cell in enumerate(cells_of(TUTORIALS / f"{name}.ipynb")):
        exec(compile("".join(cell["source"]), f"{name}, {number}", "exec"), names)
        printed = capsys.readouterr().out
        assert words(printed) == words(printed_in(cell))
        everything += printed
    return everything


def words(text):
    """The text without its numbers, which depend on the processor."""
    return re.sub(r"[\d.]+", "#", text)


def test_every_tutorial_has_a_test():
    names = sorted(path.stem for path in TUTORIALS.glob("*.ipynb"))
    assert names == ["clean_labels", "sources_of_a_lora", "trace_an_answer"]


def test_the_tutorial_on_labels_finds_them(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    printed = printed_by("clean_labels", tmp_path, monkeypatch, capsys)
    assert int(re.search(r"worst 100: (\d+) wrong", printed)[1]) > 80
    every, cleaned = re.findall(r"(?:all|cleaned): ([\d.]+)%", printed)
    assert float(cleaned) > float(every)


@pytest.mark.full
def test_the_tutorial_on_an_answer_finds_its_sentences(tmp_path, monkeypatch, capsys):
    printed = printed_by("trace_an_answer", tmp_path, monkeypatch, capsys)
    assert "5 of 5 false sentences are proponents" in printed


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # of TRL and PEFT
def test_the_tutorial_on_sources_agrees_with_training(tmp_path, monkeypatch, capsys):
    printed = printed_by("sources_of_a_lora", tmp_path, monkeypatch, capsys)
    for name in ("countries", "scenes", "summaries"):
        assert f"{name}: taught by {name}, missed without {name}" in printed
