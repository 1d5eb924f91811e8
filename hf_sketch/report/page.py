"""One HTML page of what lies beside a run's checkpoints: it needs no network."""

import base64
import hashlib
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
from hf_sketch.attribution.questions.mislabeled import FILE as AUDIT
from hf_sketch.attribution.questions.opposition import FILE as GUARD
from hf_sketch.attribution.record import FILE as ATTRIBUTION
from hf_sketch.attribution.record import QueryRecord, load_attribution
from hf_sketch.durable import printable, replace_file
from hf_sketch.report.training import (
    audit_table,
    examples_table,
    guard_table,
    loss_ends,
    noise_course,
    spikes_table,
)
from hf_sketch.spectra.files import DIRECTORY as CURVATURE
from hf_sketch.spectra.files import load_spectra
from hf_sketch.store.header import HEADER
from hf_sketch.store.locations import store_directory
from hf_sketch.subspace.search import FILE as SEARCH
from hf_sketch.subspace.search import load_dimension_search


def write_report(directory: str | Path, path: str | Path | None = None) -> Path:
    """Write one page about everything that hf_sketch left in a Trainer's output_dir.

    Answers come first: the figures that matter as cards, what `hf-sketch attribute`
    and `hf-sketch audit` found, the examples with the largest loss, and the steps that
    stand out, also to a `GuardCallback`. Then follow what was recorded (coverage,
    measured error, loss and gradient norm by step), the Hessian's spectra and the
    search for the intrinsic dimension, each if it is there. The page is one file that
    opens offline; its content security policy lets nothing else load, and control
    characters in texts are spelled out. Needs the extra `plot`.

    Args:
        directory: the output_dir.
        path: path of the page; by default `report.html` there.

    Returns:
        the path.

    Raises:
        FileNotFoundError: nothing of ours is there.
        ModuleNotFoundError: matplotlib is not installed.
    """
    directory = Path(directory)
    parts = {
        "attribution": (directory / ATTRIBUTION, _attribution),
        "audit": (directory / AUDIT, _audit),
        "guard": (directory / GUARD, _guard),
        "recorded": (store_directory(directory) / HEADER, _recorded),
        "spectra": (directory / CURVATURE, _spectra),
        "search": (directory / SEARCH, _search),
    }
    sections: dict[str, Any] = {
        name: make(directory) if path.exists() else None
        for name, (path, make) in parts.items()
    }
    if not any(sections.values()):
        raise FileNotFoundError(
            f"{directory} holds no rows, no spectra and no search. Give the output_dir "
            "of a run with a callback of hf_sketch."
        )
    if store := sections["recorded"] and sections["recorded"]["store"]:
        texts = sections["attribution"]["texts"] if sections["attribution"] else {}
        spikes = sections["recorded"]["spikes"] or []
        named = {example: None for spike in spikes for example, _ in spike["named"]}
        guarded = sections["guard"]["lines"] if sections["guard"] else []
        stopped = [one for line in guarded for one in line["examples"]]
        named |= {one["example_id"]: None for one in stopped}
        audited = sections["audit"] or []
        known = {line["example_id"]: line["text"] for line in audited}
        texts = {**named, **known, **texts}
        sections["recorded"]["examples"] = examples_table(store, texts)
    page = _rendered(directory.resolve().name, sections)
    path = directory / "report.html" if path is None else Path(path)
    replace_file(path, page.encode())
    return path


def _rendered(title: str, sections: dict[str, Any]) -> str:
    """The page, whose policy names its only script by its digest."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_harmless
    )
    environment.filters["readable"] = _readable
    templates = files("hf_sketch.report").joinpath("templates")
    script = templates.joinpath("report.js").read_text()
    digest = hashlib.sha256(script.encode()).digest()
    return environment.from_string(
        templates.joinpath("report.html").read_text()
    ).render(
        title=title,
        style=Markup(templates.joinpath("report.css").read_text()),
        script=Markup(script),
        script_digest=base64.b64encode(digest).decode(),
        **sections,
    )


def _recorded(directory: Path) -> dict[str, Any]:
    """What is in the store, warnings of what is missing, and its course."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        store = load_sketches(directory, skip_damaged=True, verify=False)
    plots: list[tuple[str, str]] = []
    if len(store.dataset):
        plots.append(("Loss", "plot_loss"))
    if store.steps:
        plots.append(("Gradient norm", "plot_gradient_norm"))
    noise = noise_course(store)
    return {
        "warnings": [str(warning.message) for warning in caught],
        "plots": [(title, _svg(name, store)) for title, name in plots],
        "store": store,
        "coverage": store.model_sketch.coverage(),
        "example_count": len(np.unique(column(store.dataset, "example_id"))),
        "steps": column(store.dataset, "step"),
        "broken": int(np.logical_not(column(store.dataset, "finite")).sum()),
        "losses": loss_ends(store),
        "spikes": spikes_table(store),
        "noise": noise and {**noise, "plot": _svg("plot_noise_scale", noise["lines"])},
    }


def _attribution(directory: Path) -> dict[str, Any]:
    record = load_attribution(directory / ATTRIBUTION)
    lines = [line for query in record.queries for line in query.lines]
    return {
        "method": record.method,
        "queries": [*map(_query, record.queries)],
        "texts": {line["example_id"]: line.get("text") for line in lines},
    }


def _audit(directory: Path) -> list[dict[str, Any]]:
    return audit_table(directory / AUDIT)


def _guard(directory: Path) -> dict[str, Any]:
    return guard_table(directory / GUARD)


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
    last = max(spectra, key=lambda spectrum: spectrum.step)
    return {
        "spectra": spectra,
        "last": last,
        "largest": float(last.eigenvalues[-1]),
        "plots": [
            ("RNEG over the steps", _svg("plot_rneg", named)),
            ("R(n) at the last step", _svg("plot_ratios", named)),
            ("Density of eigenvalues", _svg("plot_density", last)),
        ],
    }


def _search(directory: Path) -> dict[str, Any]:
    search = load_dimension_search(directory)
    return {"search": search, "plot": _svg("plot_dimension_search", search)}


def _svg(name: str, drawn: Any) -> Markup:
    """A picture of `hf_sketch.report.plots` in the page's own colors."""
    plots = importlib.import_module("hf_sketch.report.plots")
    matplotlib = importlib.import_module("matplotlib")
    buffer = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "legend.framealpha": 0}
    with matplotlib.rc_context(settings):
        figure = getattr(plots, name)(drawn)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return Markup(re.sub(r"#000000|(?<=: )black", "currentColor", text))


def _harmless(value: Any) -> Any:
    """A text without characters that could change the text around it."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return value


def _readable(token: str) -> str:
    """A token as text: with the space or line break that its tokenizer marks."""
    marks = {"Ġ": " ", "▁": " ", "Ċ": "⏎\n", "<0x0A>": "⏎\n"}
    for mark, plain in marks.items():
        token = token.replace(mark, plain)
    return token
