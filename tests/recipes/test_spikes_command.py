"""The command that lists spikes, on a store with one planted."""

import json

import pytest
import torch

from hf_sketch.cli import main
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP
from hf_sketch.store.writer import SketchWriter
from tests.helpers.stores import SKETCH, example_rows, step_row

TEXTS = ["first", "second\x1b[31m", "third", "fourth"]
SPIKE = 14


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A store whose step 14 has four times the gradient, of the examples 1 and 3."""
    directory = tmp_path_factory.mktemp("spiked")
    writer = SketchWriter(directory / "sketches", Header(SKETCH, train_rows=4))
    for step in range(1, 17):
        columns = example_rows(step, [*range(4)])
        rows = torch.eye(4)[:1].repeat(4, 1)
        if step == SPIKE:
            rows = rows * torch.tensor([0.0, 10.0, 0.0, 6.0])[:, None]
        columns |= {"sketch": rows, "weight": torch.full((4,), 0.25).double()}
        gradient = rows.mean(0, keepdim=True)
        writer.append(PER_EXAMPLE, columns)
        row = step_row(step, float(gradient.norm()), gradient)
        writer.append(PER_STEP, {**row, "clip_factor": torch.ones(1)})
    writer.flush()
    writer.close()
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(TEXTS)]
    (directory / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory


def spikes(directory, *options):
    main(["spikes", str(directory), *options])


def test_a_spike_is_printed_with_its_examples_and_saved_as_a_list(
    directory, tmp_path, capsys
):
    path = tmp_path / "quarantine.jsonl"
    train = f"--train_file={directory / 'train.jsonl'}"
    spikes(directory, train, f"--output_file={path}", "--top_k=1")
    printed = capsys.readouterr().out
    assert "1 of 16 recorded steps stand out" in printed
    assert "Step 14 (epoch 0): loss 0.1 (+0.0 deviations), gradient norm 4" in printed
    assert "2 of 4 examples carry 100% of its gradient" in printed
    assert "62.5%  #1 " in printed
    assert "seen 16 times  [1] second\\x1b[31m" in printed
    assert "and 1 more" in printed
    assert "\x1b" not in printed
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["example_id"] for row in found] == [1, 3]
    assert [row["text"] for row in found] == [TEXTS[1], TEXTS[3]]
    assert [row["steps"] for row in found] == [[SPIKE], [SPIKE]]
    assert [row["share"] for row in found] == pytest.approx([0.625, 0.375])


def test_the_rule_can_be_changed(directory, capsys):
    spikes(directory, "--threshold=100")
    assert "0 of 16 recorded steps stand out" in capsys.readouterr().out
    spikes(directory, "--carried=0.5")
    assert "1 of 4 examples carry 62%" in capsys.readouterr().out


def test_wrong_calls_are_said(directory, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "only"}\n')
    with pytest.raises(ValueError, match=r"has 1 rows, and the run was trained on 4"):
        spikes(directory, f"--train_file={other}")
    with pytest.raises(ValueError, match=r"takes one store, got 2"):
        spikes(directory, str(directory))
    with pytest.raises(ValueError, match=r"top_k must be .* got 0"):
        spikes(directory, "--top_k=0")
    train = f"--train_file={directory / 'train.jsonl'}"
    with pytest.raises(ValueError, match=r"columns \['words'\], got .* rename"):
        spikes(directory, train, "--text_columns=words")
