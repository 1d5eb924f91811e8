"""One HTML page of what lies beside a run's checkpoints: it needs no network."""

import importlib
import io
import re
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from hf_sketch.attribution.columns import column
from hf_sketch.attribution.loading import load_sketches
from hf_sketch.attribution.record import FILE as ATTRIBUTION
from hf_sketch.attribution.record import QueryRecord, load_attribution
from hf_sketch.durable import replace_file
from hf_sketch.spectra.files import DIRECTORY as CURVATURE
from hf_sketch.spectra.files import load_spectra
from hf_sketch.store.header import HEADER
from hf_sketch.store.locations import store_directory
from hf_sketch.subspace.search import FILE as SEARCH
from hf_sketch.subspace.search import load_dimension_search


def write_report(directory: str | Path, path: str | Path | None = None) -> Path:
    """Write one page about all that a Trainer's output_dir holds of ours.

    That is: the rows (their map, coverage, measured error, loss and gradient norm by
    step), what `hf-sketch attribute` answered, the Hessian's spectra and the search for
    the intrinsic dimension, each if it is there. Needs the extra `plot`.

    Args:
        directory: the output_dir.
        path: of the page; by default `report.html` there.

    Returns:
        the path.

    Raises:
        FileNotFoundError: nothing of ours is there.
        ModuleNotFoundError: matplotlib is not installed.
    """
    directory = Path(directory)
    parts = {
        "recorded": (store_directory(directory) / HEADER, _recorded),
        "attribution": (directory / ATTRIBUTION, _attribution),
        "spectra": (directory / CURVATURE, _spectra),
        "search": (directory / SEARCH, _search),
    }
    sections = {
        name: make(directory) if path.exists() else None
        for name, (path, make) in parts.items()
    }
    if not any(sections.values()):
        raise FileNotFoundError(
            f"{directory} holds no rows, no spectra and no search. Give the output_dir "
            "of a run with a callback of hf_sketch."
        )
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["readable"] = _readable
    template = files("hf_sketch.report").joinpath("templates", "report.html")
    page = environment.from_string(template.read_text()).render(
        title=directory.resolve().name, **sections
    )
    path = directory / "report.html" if path is None else Path(path)
    replace_file(path, page.encode())
    return path


def _recorded(directory: Path) -> dict[str, Any]:
    """What is in the store, warnings of what is missing, and its course."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        store = load_sketches(directory, skip_damaged=True, verify=False)
    rows = store.dataset
    return {
        "warnings": [str(warning.message) for warning in told],
        "store": store,
        "coverage": store.model_sketch.coverage(),
        "examples": np.unique(column(rows, "example_id")),
        "steps": column(rows, "step"),
        "broken": int(np.logical_not(column(rows, "finite")).sum()),
        "plot": _svg("plot_training", store) if store.steps else None,
    }


def _attribution(directory: Path) -> dict[str, Any]:
    record = load_attribution(directory / ATTRIBUTION)
    return {"method": record.method, "queries": [*map(_query, record.queries)]}


def _query(query: QueryRecord) -> dict[str, Any]:
    """A query as the page shows it: strongest first on both sides."""
    lines: list[dict[str, Any]] = [
        {"text": None, "token_scores": None} | line for line in query.lines
    ]
    for line, scores in zip(lines, query.token_scores, strict=False):
        line["token_scores"] = scores
    proponents = [line for line in lines if line["rank"] >= 0 and line["score"] > 0]
    opponents = [line for line in lines if line["rank"] < 0 and line["score"] < 0]
    parts = [abs(score) for row in query.contributions for score in row]
    return vars(query) | {
        "proponents": proponents,
        "opponents": opponents[::-1],
        "largest": max((abs(line["score"]) for line in lines), default=0) or 1.0,
        "largest_part": max(parts, default=0) or 1.0,
    }


def _spectra(directory: Path) -> dict[str, Any]:
    spectra = load_spectra(directory)
    named = {directory.resolve().name: spectra}
    return {
        "spectra": spectra,
        "plots": [
            ("RNEG over steps, and R(n) at the last", _svg("plot_figure_2", named)),
            ("Density of eigenvalues", _svg("plot_density", spectra[-1])),
        ],
    }


def _search(directory: Path) -> dict[str, Any]:
    search = load_dimension_search(directory)
    return {"search": search, "plot": _svg("plot_dimension_search", search)}


def _svg(name: str, drawn: Any) -> Markup:
    """A picture of `hf_sketch.report.plots` in the page's own colours."""
    plots = importlib.import_module("hf_sketch.report.plots")
    matplotlib = importlib.import_module("matplotlib")
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure = getattr(plots, name)(drawn)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return Markup(re.sub(r"#000000|(?<=: )black", "currentColor", text))


def _readable(token: str) -> str:
    """A token as text: with the space or line break that its tokenizer marks."""
    marks = {"Ġ": " ", "▁": " ", "Ċ": "⏎\n", "<0x0A>": "⏎\n"}
    for mark, plain in marks.items():
        token = token.replace(mark, plain)
    return token
