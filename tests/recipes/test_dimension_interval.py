import pytest

from hf_sketch.recipes.dimension.interval import Trial, bisect


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
