"""Settings that no operator takes are refused where it is built."""

import pytest

from hf_sketch import AFFD, AFJL, FFD, FJL, QK, SRHT, Grouped


@pytest.mark.parametrize("kind", [AFFD, AFJL, FFD, FJL, QK, SRHT])
@pytest.mark.parametrize("out_size", [0, -3, 9])
def test_sizes_out_of_range_are_named(kind, out_size):
    with pytest.raises(ValueError, match=rf"in \[1, 8\].*got {out_size}: pass"):
        kind(7, out_size, seed=0)
    with pytest.raises(ValueError, match="in_size must be at least 1, got 0"):
        kind(0, 1, seed=0)


@pytest.mark.parametrize("kind", [AFFD, AFJL, FJL])
def test_an_unknown_mix_is_named(kind):
    with pytest.raises(ValueError, match=r"mix must be one of .*, got 'dct'"):
        kind(7, 4, seed=0, mix="dct")


def test_operators_whose_sizes_do_not_meet_are_named():
    with pytest.raises(ValueError, match=r"must give 100 numbers.* got 50: build the"):
        AFFD(100, 20, seed=1) @ QK(1000, 50, seed=2)


@pytest.mark.parametrize(
    ("sides", "widths", "message"),
    [
        ((10, 5), (8, 8), r"product of in_size=60, got \(10, 5\): pass the weight's"),
        ((60,), (8, 8), r"sides must be .* got \(60,\)"),
        ((10, 6), (8, 6), r"powers of two of at most 32 .* got \(8, 6\): leave"),
        ((10, 6), (64, 8), r"at most 32 with a product .* got \(64, 8\)"),
        ((10, 6), (4, 4), r"product of at least that, got \(4, 4\)"),
    ],
)
def test_sides_and_widths_that_do_not_fit_are_named(sides, widths, message):
    with pytest.raises(ValueError, match=message):
        Grouped(60, 30, seed=0, sides=sides, widths=widths)
