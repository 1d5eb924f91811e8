import json

import pytest

from hf_sketch.recipes.dimension.interval import Trial, bisect
from hf_sketch.recipes.dimension.report import interval_of
from tests.helpers.trained.recipe_runs import barely_trained, small_xsum


def interval(found, least, bisections):
    """Of a task that any dimension from `least` on reaches."""
    return bisect(found, lambda dim: Trial(dim, (), dim >= least), bisections)


@pytest.mark.parametrize("least", [1, 3, 100, 129, 200, 256])
def test_enough_bisections_find_the_least_dimension(least):
    found = interval(256, least, 40)
    assert found.high == least or found.low == 0
    assert found.low < least <= found.high
    assert found.high - max(found.low, least - 1) <= 2
    assert len({trial.dim for trial in found.trials}) == len(found.trials)


def test_half_of_the_dimension_is_tried_first():
    assert [trial.dim for trial in interval(1024, 700, 3).trials] == [512, 724, 609]
    found = interval(1024, 700, 3)
    assert (found.low, found.high) == (609, 724)
    assert [trial.dim for trial in interval(1024, 200, 3).trials] == [512, 256, 128]


def test_nothing_is_tried_below_one_dimension():
    assert interval(1, 1, 5).trials == ()
    assert interval(4, 1, 9).high == 1


def test_sentences_claim_only_what_was_tried():
    def sentences(least):
        trials = bisect(16, lambda dim: Trial(dim, (dim / 16,), dim >= least), 2)
        return interval_of(trials)

    tried = " Tried: 8: 0.5000; 4: 0.2500."
    assert sentences(7) == (
        "The least dimension is above 4 and at most 8: most trainings reach the target "
        "in 8, and most trainings do not in 4." + tried
    )
    assert sentences(1) == (
        "The least dimension is at most 4: most trainings reach the target in 4. "
        "Nothing smaller was tried: pass more --bisections." + tried
    )
    assert sentences(16) == (
        "The least dimension is above 11 and at most 16: the search reached the target "
        "in 16, and most trainings do not in 11. Tried: 8: 0.5000; 11: 0.6875."
    )


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"bisections": -1}, "bisections must"), ({"bisection_seeds": 0}, "_seeds must")],
)
def test_bad_numbers_of_bisections_are_refused_before_training(
    tmp_path, settings, match
):
    with pytest.raises(ValueError, match=match):
        small_xsum(tmp_path, settings, max_steps=1)
    assert not any(tmp_path.iterdir())


@barely_trained
@pytest.mark.full
def test_a_resumed_run_keeps_the_trainings_of_its_bisection(tmp_path, capsys):
    settings = {"baseline_steps": 1, "baseline_learning_rate": 0.0, "target": None}
    settings |= {"baseline": True, "bisections": 1, "bisection_seeds": 2}
    small_xsum(tmp_path, settings, max_steps=1)
    assert "8 dimensions with seed 42" in capsys.readouterr().out
    last = tmp_path / "interval" / "8-43"
    (last / "best.json").unlink()  # as if the run had been stopped before it
    first = tmp_path / "interval" / "8-42" / "best.json"
    kept = json.loads(first.read_text())
    first.write_text(json.dumps({**kept, "metrics": {"eval_rouge1": 0.25}}))
    settings["bisections"] = 2
    small_xsum(tmp_path, settings, max_steps=1, resume_from_checkpoint="true")
    assert "8 dimensions with seed 42" not in (printed := capsys.readouterr().out)
    assert "8 dimensions with seed 43" in printed
    saved = json.loads((tmp_path / "results.json").read_text())
    dims = [trial["dim"] for trial in saved["results"]["interval"]["trials"]]
    assert dims == [8, 4]
    assert saved["results"]["interval"]["trials"][0]["best"] == [0.25, 0.0]
    other = {"max_steps": 2, "resume_from_checkpoint": "true"}
    with pytest.raises(
        ValueError, match=r"8-42 must have had .* got \{'max_steps': 1\}"
    ):
        small_xsum(tmp_path, settings, **other)
    small_xsum(tmp_path, settings, max_steps=1)
    assert json.loads(first.read_text()) == kept
