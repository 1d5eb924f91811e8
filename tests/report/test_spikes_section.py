"""The page's sections on steps that stand out, and on suspicious examples."""

import json
import re

import torch

from hf_sketch import ModelSketch
from hf_sketch.report.page import write_report
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP
from hf_sketch.store.writer import SketchWriter


def test_a_planted_spike_is_named_on_the_page(tmp_path):
    writer = SketchWriter(
        tmp_path / "sketches", Header(ModelSketch((("w", (8, 1)),), 8))
    )
    for step in range(1, 31):
        loss = 9.0 if step == 21 else 1.0 + 0.01 * (step % 3)
        shared = {"epoch": 0, "step": step, "learning_rate": 0.1}
        shared |= {"loss": loss, "gradient_norm": loss, "finite": True}
        one = {name: torch.tensor([value]) for name, value in shared.items()}
        of = {"example_id": step + 100, "micro_step": 0, "rank": 0, "weight": 1.0}
        of = {name: torch.tensor([value]) for name, value in of.items()}
        sketch = torch.full((1, 8), loss)
        writer.append(PER_EXAMPLE, {**one, **of, "sketch": sketch})
        one.pop("loss")
        clip = {"clip_factor": torch.ones(1)}
        writer.append(PER_STEP, {**one, **clip, "sketch": sketch})
        writer.end_step()
    writer.flush()
    writer.close()
    page = write_report(tmp_path).read_text()
    (spike,) = re.findall(r'<tr id="step-(\d+)">(.*?)</tr>', page, re.S)
    assert spike[0] == "21"
    assert "#121</a> 100%" in spike[1]
    assert "<b>1</b><span>steps stand out" in page


def test_suspicious_examples_are_on_the_page_with_their_texts(tmp_path):
    lines = [
        {
            "example_id": 100 - i,
            "suspicion": 9.5 - i if i else None,
            "losses": [1.25, None],
            "why": f"reason {i}",
            "text": f"<b>text {i}</b>",
        }
        for i in range(120)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "audit.jsonl").write_text(text)
    page = write_report(tmp_path).read_text()
    section = page[page.index('<section id="audit">') :]
    assert section.count("<tr>") == 1 + 100
    assert "&lt;b&gt;text 99&lt;/b&gt;" in section
    assert "text 100" not in section
    assert "<td>8.50</td>" in section
    assert "1.25 -" in section
