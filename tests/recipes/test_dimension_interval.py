import pytest

from hf_sketch.recipes.dimension.interval import Trial, bisect
from hf_sketch.recipes.dimension.report import interval_of


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
        "in 8, and not in 4." + tried
    )
    assert sentences(1) == (
        "The least dimension is at most 4, where most trainings reach the target. "
        "Nothing smaller was tried: pass more --bisections." + tried
    )
