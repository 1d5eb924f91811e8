"""Planted spikes: the count of what is found, and a small run."""

import pytest

from hf_sketch.recipes.tables.quality.planted_spikes import (
    PlantedSpikesArguments,
    run_planted_spikes,
    wilson,
)


def test_intervals_of_parts_are_wilsons():
    """The ends solve (part - p)^2 = z^2 p (1 - p) / n."""
    for count, total in ((0, 7), (3, 8), (40, 40)):
        part, *ends = wilson(count, total)
        assert part == count / total
        for end in ends:
            variance = 1.96**2 * end * (1 - end) / total
            assert (part - end) ** 2 == pytest.approx(variance, abs=1e-12)
    assert wilson(0, 0) is None


@pytest.mark.parametrize(
    "task", ["texts", pytest.param("labels", marks=pytest.mark.full)]
)
def test_a_small_run_counts_what_was_planted(tmp_path, task):
    arguments = PlantedSpikesArguments(output_dir=str(tmp_path), task=task, tiny=True)
    found = run_planted_spikes(arguments)
    assert (tmp_path / f"planted_spikes_{task}.json").exists()
    assert {(x["planted"], x["judged_steps"]) for x in found.values()} == {(2, 46)}
    for kind in ("found", "false"):  # higher thresholds find fewer steps
        counts = [total[kind] for total in found.values()]
        assert counts == sorted(counts, reverse=True)


def test_an_unknown_task_is_refused(tmp_path):
    with pytest.raises(ValueError, match="labels or texts, got 'images'"):
        run_planted_spikes(PlantedSpikesArguments(str(tmp_path), task="images"))
