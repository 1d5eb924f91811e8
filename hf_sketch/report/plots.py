"""Pictures of what a run left behind; needs the extra `plot`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_sketch.attribution.collection import GradientRows
from hf_sketch.attribution.columns import column
from hf_sketch.spectra.spectrum import Spectrum
from hf_sketch.subspace.search import DimensionSearch

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, ScalarFormatter
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "hf_sketch.report.plots needs matplotlib, got none installed: call pip install "
        '"hf-sketch[plot]".'
    ) from error

Array = np.ndarray[Any, Any]

_EIGENVALUE = "eigenvalue (loss / parameter²)"
_OUTLIER_RATIO = 0.2  # above it `Spectrum.outliers` counts
_EARLY_STEPS = 10  # up to here the axis of steps is linear
_WINDOWS = 30  # of a running mean, over the whole course
_SEEN_BUMP = 1e-2  # of one eigenvalue's bump: what is lower is not drawn


def plot_rneg(spectra_by_name: Mapping[str, Sequence[Spectrum]]) -> Figure:
    """RNEG over the steps of training, a line for each name.

    Bars are standard errors of the ratio, with those of its two eigenvalues taken as
    independent.

    Args:
        spectra_by_name: spectra of each run, as `load_spectra` returns them.

    Raises:
        ValueError: there is no spectrum of a name.
    """
    return _drawn(spectra_by_name, _draw_rneg)


def plot_ratios(spectra_by_name: Mapping[str, Sequence[Spectrum]]) -> Figure:
    """R(n) against n at the last step of each name, with a line at 20%.

    Above the line are the outliers. Bands are standard errors. Arguments and errors are
    those of `plot_rneg`.
    """
    return _drawn(spectra_by_name, _draw_ratios)


def plot_figure_2(spectra_by_name: Mapping[str, Sequence[Spectrum]]) -> Figure:
    """The paper's Figure 2: (a) `plot_rneg` and (b) `plot_ratios`, which see.

    Reference:
        Schioppa 2024, arXiv:2402.03994, Figure 2; differs in the bars and bands.
    """
    figure = _drawn(spectra_by_name, _draw_rneg, _draw_ratios)
    for axes, label in zip(figure.axes, ("(a)", "(b)"), strict=True):
        axes.set_title(label, loc="left")
    return figure


def plot_density(spectrum: Spectrum) -> Figure:
    """The log density of all eigenvalues, and those that were found as ticks.

    Both are without the sketch's shift. A tick's bar is its standard error.
    """
    figure = Figure(layout="constrained")
    axes: Axes = figure.subplots()
    found = spectrum.density()
    eigenvalues = spectrum.eigenvalues
    bump = 1 / (found.width * math.sqrt(2 * math.pi))
    floor = _SEEN_BUMP * bump / spectrum.model_sketch.out_size
    axes.plot(found.grid - spectrum.shift, found.density)
    axes.errorbar(
        eigenvalues,
        torch.full_like(eigenvalues, floor),
        xerr=spectrum.standard_errors,
        linestyle="none",
        marker="|",
        markersize=12,
        elinewidth=0.8,
        color="black",
        label=f"{len(eigenvalues)} eigenvalues",
    )
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor / 2)
    axes.set_xlabel(_EIGENVALUE)
    axes.set_ylabel("density of eigenvalues (parameter² / loss)")
    axes.set_title(f"step {spectrum.step}")
    axes.legend().set_in_layout(False)  # a long name must not squeeze the axes
    return figure


def _drawn(
    spectra_by_name: Mapping[str, Sequence[Spectrum]],
    *draw: Callable[[Axes, Mapping[str, Sequence[Spectrum]]], None],
) -> Figure:
    """Draw spectra in one way or in several, side by side."""
    empty = [name for name, spectra in spectra_by_name.items() if not spectra]
    if empty or not spectra_by_name:
        raise ValueError(
            "plots need at least one spectrum of every name, got "
            f"{f'none of {empty}' if empty else 'no name'}: pass "
            '{"name": load_spectra(output_dir)}.'
        )
    size = None if len(draw) == 1 else (10, 4)
    figure = Figure(figsize=size, layout="constrained")
    for place, one in enumerate(draw):
        axes = figure.add_subplot(1, len(draw), place + 1)
        one(axes, spectra_by_name)
        axes.grid(alpha=0.3)
        axes.legend().set_in_layout(False)
    return figure


def _draw_rneg(axes: Axes, spectra_by_name: Mapping[str, Sequence[Spectrum]]) -> None:
    for name, spectra in spectra_by_name.items():
        rneg = [spectrum.rneg for spectrum in spectra]
        errors = [
            float(_ratio_errors(s, torch.tensor(s.rneg), s.standard_errors[0]))
            for s in spectra
        ]
        below = [min(error, ratio) for error, ratio in zip(errors, rneg, strict=True)]
        steps = [spectrum.step for spectrum in spectra]
        axes.errorbar(steps, rneg, [below, errors], marker="o", capsize=2, label=name)
    axes.set_xscale("symlog", linthresh=_EARLY_STEPS)
    axes.set_xlim(left=-1)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step of the optimizer")
    axes.set_ylabel("RNEG: |least eigenvalue| / greatest (ratio)")


def _draw_ratios(axes: Axes, spectra_by_name: Mapping[str, Sequence[Spectrum]]) -> None:
    for name, spectra in spectra_by_name.items():
        last = max(spectra, key=lambda spectrum: spectrum.step)
        ratios = last.ratios
        numbers = range(1, len(ratios) + 1)
        label = f"{name}, step {last.step}"
        (line,) = axes.plot(numbers, ratios, marker=".", label=label)
        errors = last.standard_errors.flip(0)[: len(ratios)]
        errors = _ratio_errors(last, ratios, errors)
        errors[:1] = 0  # R(1) is 1 without error
        axes.fill_between(
            numbers,
            (ratios - errors).clamp(min=0),
            ratios + errors,
            color=line.get_color(),
            alpha=0.2,
        )
    axes.axhline(
        _OUTLIER_RATIO,
        color="gray",
        linestyle="--",
        label=f"{_OUTLIER_RATIO:.0%}: outliers above",
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(LogFormatter())
    axes.xaxis.set_minor_formatter(LogFormatter())
    axes.set_ylim(bottom=0)
    axes.set_xlabel("n, of the positive eigenvalues from the greatest")
    axes.set_ylabel("R(n): n-th eigenvalue / greatest (ratio)")


def _ratio_errors(spectrum: Spectrum, ratios: Tensor, errors: Tensor) -> Tensor:
    """The standard errors of ratios to the greatest eigenvalue, by those of the others.

    The errors of any two eigenvalues are taken as independent.
    """
    greatest = float(spectrum.eigenvalues[-1])
    if greatest <= 0:
        return torch.zeros_like(errors)
    of_greatest = ratios * spectrum.standard_errors[-1]
    return (errors.square() + of_greatest.square()).sqrt() / greatest


def plot_dimension_search(search: DimensionSearch) -> Figure:
    """The metric over the steps, with the dimension of each stage and its doublings.

    Args:
        search: as `load_dimension_search` gives.

    Raises:
        ValueError: nothing was evaluated.
    """
    if not search.path:
        raise ValueError(
            "a search needs an evaluation to be drawn, got none: train with "
            "IntrinsicDimensionCallback."
        )
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    steps = [stage.step for stage in search.path]
    axes.plot(steps, [stage.metric for stage in search.path], "o-", markersize=3)
    target = f"target {search.target:.4g}"
    axes.axhline(search.target, linestyle="--", color="C1", label=target)
    axes.legend()
    doubled = [stage for stage in search.path if stage.decision == "double"]
    for stage in doubled:
        axes.axvline(stage.step, linewidth=0.5, color="grey")
    begun = [(search.path[0].step, search.path[0].dim)]
    begun += [(s.step, min(2 * s.dim, search.max_dim)) for s in doubled]
    for step, dim in begun:
        place = axes.get_xaxis_transform()
        axes.text(step, 1.01, f"{dim:,}", transform=place, rotation=60, fontsize=7)
    axes.set_xlabel("optimizer step; above, the dimension from there on")
    axes.set_ylabel(search.metric)
    return figure


def plot_loss(store: GradientRows) -> Figure:
    """The mean loss of each step's examples, and its running mean.

    Args:
        store: store whose rows of examples have a step.
    """
    steps, losses = column(store.dataset, "step"), column(store.dataset, "loss")
    known = np.isfinite(losses)
    counts = np.bincount(steps[known])
    there = counts.nonzero()[0]
    sums = np.bincount(steps[known], losses[known])
    return _course(there, sums[there] / counts[there], "mean loss of its examples")


def plot_gradient_norm(store: GradientRows) -> Figure:
    """The norm of each step's gradient before clipping, and its running mean.

    Args:
        store: store with rows of steps.
    """
    steps: Dataset | None = store.steps
    if steps is None:
        raise ValueError(
            "gradient norms come from rows of steps, got none: record them with "
            "GradientSketchCallback."
        )
    norms = column(steps, "gradient_norm")
    figure = _course(column(steps, "step"), norms, "norm of the gradient")
    figure.axes[0].set_yscale("log")
    return figure


def plot_noise_scale(lines: Dataset) -> Figure:
    """The smoothed noise scale of steps with its interval, above their batch size.

    Args:
        lines: what `GradientRows.noise_scale` returns.
    """
    names = ("step", "noise_scale", "low", "high", "step_examples")
    steps, scale, low, high, batch = (column(lines, name) for name in names)
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    known = np.isfinite(low) & np.isfinite(scale) & (low > 0)
    top = np.where(np.isfinite(high), high, np.nanmax(scale[known], initial=1.0) * 10)
    axes.fill_between(steps[known], low[known], top[known], alpha=0.25, linewidth=0)
    axes.plot(steps[known], scale[known], linewidth=1.8, label="noise scale")
    axes.plot(steps, batch, linewidth=0.8, color="black", label="batch")
    axes.set(xlabel="optimizer step", ylabel="examples", yscale="log")
    axes.legend()
    return figure


def _course(steps: Array, values: Array, label: str) -> Figure:
    """Draw values over the steps, pale, and their running mean over a 30th of these."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, linewidth=0.8, alpha=0.35)
    window = max(1, len(values) // _WINDOWS)
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], means, linewidth=1.8, color="C0")
    axes.set(xlabel="optimizer step", ylabel=label)
    return figure
