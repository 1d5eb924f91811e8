"""The page's section on noise and batch size."""

import pytest
import torch

from hf_sketch import ModelSketch, load_sketches
from hf_sketch.report.page import write_report
from hf_sketch.report.training import noise_course
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP, row_columns
from hf_sketch.store.writer import SketchWriter

BATCH, SIZE, STEPS = 4, 64, 200


def store(directory, trace):
    """Rows with a mean of norm 1 and a covariance of known trace."""
    generator = torch.Generator().manual_seed(0)
    sketch = ModelSketch((("w", (SIZE, 1)),), SIZE)
    writer = SketchWriter(directory / "sketches", Header(sketch))
    for step in range(1, STEPS + 1):
        noise = torch.randn(BATCH, SIZE, generator=generator)
        rows = noise * (trace / SIZE) ** 0.5 + torch.eye(1, SIZE)
        place = {"epoch": 0, "step": step, "learning_rate": 0.1}
        of = {"example_id": torch.arange(BATCH), "micro_step": 0, "rank": 0}
        of |= {"loss": 1.0, "weight": 1 / BATCH}
        writer.append(PER_EXAMPLE, row_columns(rows, **place, **of))
        mean = rows.mean(0, keepdim=True)
        writer.append(PER_STEP, row_columns(mean, **place, clip_factor=1.0))
        writer.end_step()
    writer.flush()
    writer.close()
    return directory


@pytest.mark.parametrize(
    ("trace", "free"), [(150.0, True), (10.0, False)], ids=["noisy", "calm"]
)
def test_the_page_says_whether_a_batch_twice_as_large_is_free(tmp_path, trace, free):
    course = noise_course(load_sketches(store(tmp_path, trace)))
    assert course["batch"] == BATCH
    last = course["last"]
    assert last["low"] < trace < last["high"]
    page = write_report(tmp_path).read_text()
    section = page[page.index('<section id="noise">') :]
    section = section[: section.index("</section>")]
    assert "A step took 4 examples." in section
    assert ("at most a tenth more examples" in section) == free
    assert ("It did not stay above nine batches" in section) == (not free)
    if free:
        assert f"From step {course['free_from']} on" in section
        lows = {line["step"]: line["low"] for line in course["lines"]}
        assert all(lows[n] >= 36 for n in range(course["free_from"], STEPS + 1))
        assert not lows[course["free_from"] - 1] >= 36
    assert "<svg" in section


def test_a_store_without_rows_of_steps_has_no_such_section(tmp_path):
    """Fewer than ten steps say nothing, nor does a single kind of rows."""
    rows = load_sketches(store(tmp_path, 10.0))
    assert noise_course(rows.step_rows()) is None
    early = rows.steps.select(range(9))
    assert noise_course(type(rows)(rows.model_sketch, rows.dataset, early)) is None
