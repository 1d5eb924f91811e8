"""What the plots of spectra show: the data in their axes."""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_sketch import TokenScores
from tests.helpers.spectra import VALUES, WIDE, made_of

pytest.importorskip("matplotlib")

from hf_sketch.report import plots
from hf_sketch.report.heat_map import plot_token_scores

RNEG = 0.3  # of VALUES, as test_spectrum.py has it
RATIOS = [1, 0.4, 0.1, 0.05]
ERRORS = {value: (2 / WIDE.out_size * value**2 + 0.25) ** 0.5 for value in VALUES}


def known(step=0, values=VALUES, residual=0.5, **fields):
    """A spectrum of these eigenvalues and a shift of their weighted mean."""
    residuals = torch.full((len(values),), residual, dtype=torch.float64)
    fields = {"model_sketch": WIDE, "step": step, "kept": (), **fields}
    return made_of(values, residuals=residuals, **fields)


def all_negative(step):
    return known(step, (-6.0, -5, -4, -3, -2, -1), weights=(0, 0, 0, 0, 0, 1))


@pytest.fixture
def known_errors(monkeypatch):
    """The trace, and so the shift, is known without error."""
    errors = torch.tensor([*ERRORS.values()], dtype=torch.float64)
    monkeypatch.setattr("hf_sketch.Spectrum.standard_errors", errors)


def line(axes, name):
    """The points of the line of this label."""
    for container in axes.containers:
        if container.get_label() == name:
            return container.lines[0].get_xydata()
    return next(x for x in axes.lines if x.get_label() == name).get_xydata()


def bars(axes):
    """Low and high end of each error bar of the first line."""
    segments = axes.containers[0].lines[2][0].get_segments()
    return [segment.tolist() for segment in segments]


def test_rneg_is_drawn_over_the_steps_with_its_standard_error(known_errors):
    figure = plots.plot_rneg({"a": [known(0), known(50)], "b": [known(10)]})
    (axes,) = figure.axes
    assert line(axes, "a") == pytest.approx(np.array([[0, RNEG], [50, RNEG]]))
    assert line(axes, "b") == pytest.approx(np.array([[10, RNEG]]))
    # Of -3 over 10: the relative errors' squares add up.
    relative = ((ERRORS[-3.0] / 3) ** 2 + (ERRORS[10.0] / 10) ** 2) ** 0.5
    low, high = RNEG - RNEG * relative, RNEG + RNEG * relative
    expected = [[[0, low], [0, high]], [[50, low], [50, high]]]
    assert np.array(bars(axes)) == pytest.approx(np.array(expected))
    assert "step" in axes.get_xlabel()
    assert "ratio" in axes.get_ylabel()


def test_the_bars_of_rneg_end_at_zero():
    figure = plots.plot_rneg({"a": [known(residual=20)]})
    ((low, high),) = bars(figure.axes[0])
    assert low[1] == pytest.approx(0)
    assert high[1] > 2 * RNEG


def test_without_a_positive_eigenvalue_rneg_is_not_drawn():
    figure = plots.plot_rneg({"a": [known(0), all_negative(10)]})
    figure.canvas.draw()
    assert np.isfinite(line(figure.axes[0], "a")[:, 1]).tolist() == [True, False]


def test_ratios_are_those_of_the_last_step_with_a_line_at_a_fifth(known_errors):
    first = known(0, values=tuple(2 * value for value in VALUES))
    figure = plots.plot_ratios({"a": [known(50), first]})
    (axes,) = figure.axes
    points = line(axes, "a, step 50")
    assert points == pytest.approx(np.array([*enumerate(RATIOS, 1)]))
    (fifth,) = {y for _, y in line(axes, "20%: outliers above").tolist()}
    assert int((points[:, 1] > fifth).sum()) == known().outliers
    relative = ((ERRORS[4.0] / 4) ** 2 + (ERRORS[10.0] / 10) ** 2) ** 0.5
    band = axes.collections[0].get_paths()[0].vertices
    at = {n: sorted(y for x, y in band.tolist() if x == n) for n in (1, 2)}
    assert at[1] == pytest.approx([1] * len(at[1]))
    ends = [0.4 - 0.4 * relative, 0.4 + 0.4 * relative]
    assert [at[2][0], at[2][-1]] == pytest.approx(ends)
    assert "ratio" in axes.get_ylabel()


def test_a_run_without_a_positive_eigenvalue_has_no_ratios():
    figure = plots.plot_ratios({"a": [all_negative(0)]})
    figure.canvas.draw()
    assert not len(line(figure.axes[0], "a, step 0"))


def test_the_density_is_logarithmic_and_has_the_eigenvalues_as_ticks():
    moved = known(7, tuple(value + 5 for value in VALUES))
    assert moved.shift == pytest.approx(5)
    figure = plots.plot_density(moved)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    curve = axes.lines[0].get_xydata()
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(1, abs=1e-6)
    mean = np.trapezoid(curve[:, 0] * curve[:, 1], curve[:, 0])
    assert mean == pytest.approx(0, abs=1e-6)  # the shift is gone
    ticks = line(axes, f"{len(VALUES)} eigenvalues")
    assert ticks[:, 0] == pytest.approx(np.array(VALUES))
    bottom, top = axes.get_ylim()
    assert all(bottom < y < top for y in ticks[:, 1])
    low, high = bars(axes)[-1]
    error = float(moved.standard_errors[-1])
    assert (low[0], high[0]) == pytest.approx((10 - error, 10 + error))
    assert axes.get_title() == "step 7"
    assert "loss" in axes.get_xlabel()


def test_figure_2_has_both_panels():
    runs = {"a": [known(0), known(50)]}
    left, right = plots.plot_figure_2(runs).axes
    for axes, alone, name in (
        (left, plots.plot_rneg(runs), "a"),
        (right, plots.plot_ratios(runs), "a, step 50"),
    ):
        assert np.array_equal(line(axes, name), line(alone.axes[0], name))
    assert [axes.get_title("left") for axes in (left, right)] == ["(a)", "(b)"]


def test_the_loss_is_drawn_with_its_running_mean():
    steps = [step for step in range(1, 121) for _ in range(2)]
    rows = {"step": steps, "loss": [float(step % 7) for step in steps]}
    store = SimpleNamespace(dataset=Dataset.from_dict(rows))
    raw, smooth = (drawn.get_xydata() for drawn in plots.plot_loss(store).axes[0].lines)
    assert raw.tolist() == [[step, step % 7] for step in range(1, 121)]
    means = [sum((s - i) % 7 for i in range(4)) / 4 for s in range(4, 121)]
    assert smooth[:, 0].tolist() == [*range(4, 121)]
    assert smooth[:, 1] == pytest.approx(np.array(means))


def test_parts_of_a_score_are_drawn_by_token_with_0_in_the_middle():
    scores = torch.tensor([[1.0, -3.0], [0.5, 2.0], [0.0, 0.25]])
    found = TokenScores(scores, [1, 2, 4], [0, 3], 0.75)
    figure = plot_token_scores(found, "abcde", "wxyz")
    axes = figure.axes[0]
    (image,) = axes.get_images()
    np.testing.assert_array_equal(image.get_array(), scores)
    assert image.get_clim() == (-3, 3)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "c", "e"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["w", "z"]


def test_a_long_name_does_not_squeeze_the_axes():
    plots.plot_figure_2({100 * "name": [known()]}).canvas.draw()


@pytest.mark.parametrize("plot", ["plot_rneg", "plot_ratios", "plot_figure_2"])
def test_a_run_without_spectra_is_refused(plot):
    message = r"got none of \['b'\]: pass {\"name\": load_spectra\(output_dir\)}"
    with pytest.raises(ValueError, match=message):
        getattr(plots, plot)({"a": [known()], "b": []})
    with pytest.raises(ValueError, match="got no name"):
        getattr(plots, plot)({})


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "hf_sketch.report.plots")
    with pytest.raises(ModuleNotFoundError, match=r'pip install "hf-sketch\[plot\]"'):
        importlib.import_module("hf_sketch.report.plots")
