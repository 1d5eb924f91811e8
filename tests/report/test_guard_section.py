"""The page's section on steps that stood out to a guard."""

import json
import shutil

import pytest

from hf_sketch.report.page import write_report
from tests.helpers.trained.guarded_training import (
    BAD,
    BAD_STEP,
    STEPS,
    guard_of,
    lines_of,
    recorder,
    run,
)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A run whose bad step was skipped."""
    directory = tmp_path_factory.mktemp("guarded")
    run(directory, recorder(), guard_of("skip"))
    return directory


def test_steps_that_stood_out_are_on_the_page_with_their_examples(guarded):
    page = write_report(guarded).read_text()
    section = page[page.index('<section id="guard">') :]
    section = section[: section.index("</section>")]
    assert f"judged {STEPS} steps" in section
    assert section.count("<tr>") == 1 + 1
    assert f'<td data-value="{BAD_STEP}">{BAD_STEP}</td>' in section
    assert '<td class="text">skip</td>' in section
    (line,) = [line for line in lines_of(guarded) if line["action"]]
    assert f"({line['loss_deviation']:+.1f})" in section
    for example in BAD:
        assert f"#{example}</a> (" in section
        assert f'<tr id="example-{example}">' in page


def test_many_alarms_are_counted_and_the_first_are_shown(guarded, tmp_path):
    """A line that a kill has cut off is left out."""
    shutil.copytree(guarded, tmp_path, dirs_exist_ok=True)
    named = {"example_id": 3, "reasons": ["loss"]}
    line = {"opposition": None, "loss": 2.0, "loss_deviation": None}
    line |= {"opposition_deviation": None, "action": "log", "reasons": ["loss"]}
    lines = [{**line, "step": i, "examples": [named] * 7} for i in range(1, 61)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 61'
    (tmp_path / "guard.jsonl").write_text(text)
    section = write_report(tmp_path).read_text().split('<section id="guard">')[1]
    section = section[: section.index("</section>")]
    assert "judged 60 steps" in section
    assert section.count("<tr>") == 1 + 50
    assert section.count("and 2 more") == 50
    assert "not known" in section
