"""What queries were answered, with the texts: what a report shows of attribution."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from datasets import Dataset

from hf_sketch.attribution.collection import GradientRows
from hf_sketch.attribution.columns import column
from hf_sketch.attribution.methods import METHODS, Method
from hf_sketch.durable import replace_file
from hf_sketch.model.groups import Layers

FILE: Final = "attribution.json"
_FORMAT_VERSION = 1
_COLUMNS_OF_MAP = 40

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class QueryRecord:
    """A query and the examples that moved the model most for and against it.

    Args:
        query_id: row of the query in its dataset.
        text: text of the query.
        loss: the model's own.
        tokens: pairs of a token and its loss; none where they were not taken.
        lines: lines of `GradientRows.attribute`, with `text` where it is known.
        steps: the first optimizer step of each column of the map; none without steps.
        contributions: scores by line and column, summed; empty without steps.
        token_scores: parts of the lines' scores by line and token; empty where they
            were not taken.
    """

    query_id: int
    text: str
    loss: float
    lines: list[dict[str, Any]]
    tokens: list[list[Any]]
    steps: list[int]
    contributions: list[list[float]]
    token_scores: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class AttributionRecord:
    """All queries of one call, and how they were scored.

    Args:
        method: the method's name.
        queries: each with its answer.
    """

    method: str
    queries: list[QueryRecord]

    def save(self, path: Path) -> None:
        """Write JSON, in one step.

        Raises:
            OSError: it cannot be written.
        """
        content = {"format_version": _FORMAT_VERSION, **asdict(self)}
        replace_file(path, json.dumps(content, indent=1).encode())


def load_attribution(path: Path) -> AttributionRecord:
    """What `AttributionRecord.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another version.
    """
    content = json.loads(path.read_text())
    version = content.pop("format_version", None)
    if version != _FORMAT_VERSION:
        raise ValueError(
            f"{path} must have format_version {_FORMAT_VERSION}, got {version!r}: make "
            "it again with hf-sketch attribute."
        )
    queries = [QueryRecord(**query) for query in content["queries"]]
    return AttributionRecord(content["method"], queries)


def record_attribution(
    store: GradientRows,
    queries: GradientRows,
    query_texts: Sequence[str],
    *,
    top_k: int = 5,
    bottom_k: int = 5,
    method: str | Method = "preconditioned",
    layers: Layers | None = None,
    train_texts: Sequence[str] | None = None,
    tokens: Sequence[list[list[Any]]] | None = None,
    token_sketches: Sequence[GradientRows] | None = None,
) -> AttributionRecord:
    """Attribute queries to training examples, over all occasions of each.

    Args:
        store: the rows of training.
        queries: sketched by the store's map.
        query_texts: query texts of each query.
        top_k: number of proponents listed per query.
        bottom_k: number of opponents listed per query.
        method: see `GradientRows.attribute`.
        layers: the same.
        train_texts: texts of the examples, by example_id; None if unknown.
        tokens: tokens of each query, see `QueryRecord`.
        token_sketches: for each query, the gradients of each token's loss but the
            first's, whose mean is the query's.

    Raises:
        ValueError: see `GradientRows.attribute`; or tokens are to have scores by
            "cosine", which is not a sum over them.
    """
    if token_sketches is not None:
        check_token_method(method)
    scored = store.scored_by(method, layers)
    lines = store.attribute(queries, top_k, scored, bottom_k=bottom_k)
    rows: list[dict[str, Any]] = lines.to_list()
    for line in rows:
        if train_texts and 0 <= line["example_id"] < len(train_texts):
            line["text"] = train_texts[line["example_id"]]
    steps, listed, parts = _contributions(store, queries, scored, lines)
    losses, query_ids = (queries.dataset[name][:] for name in ("loss", "example_id"))
    records: list[QueryRecord] = []
    for number, text in enumerate(query_texts):
        mine = [line for line in rows if line["query"] == number]
        ids = [line["example_id"] for line in mine]
        record = QueryRecord(
            query_id=query_ids[number],
            text=text,
            loss=losses[number],
            lines=mine,
            tokens=[] if tokens is None else list(tokens[number]),
            steps=steps,
            contributions=parts[number, np.searchsorted(listed, ids)].tolist()
            if steps
            else [],
            token_scores=[]
            if token_sketches is None
            else _token_scores(store, token_sketches[number], scored, ids),
        )
        records.append(record)
    name = method if isinstance(method, str) else type(method).__name__
    return AttributionRecord(name, records)


def is_averaged(method: str | Method) -> bool:
    """Return whether an example's score is the mean over its rows, not their sum."""
    chosen = METHODS.get(method) if isinstance(method, str) else method
    return chosen is not None and chosen.averaged


def check_token_method(method: str | Method) -> None:
    """Raise unless a query's score is a sum over its tokens."""
    if is_averaged(method):
        raise ValueError(
            "tokens have scores by methods that are linear in the query, got cosine: "
            "take another method, or no scores of tokens."
        )


def _token_scores(
    store: GradientRows, tokens: GradientRows, method: Method, ids: list[int]
) -> list[list[float]]:
    """What each token of a query has of the examples' scores: by example and token."""
    if not len(tokens.dataset):
        return [[0.0] for _ in ids]
    met = store.where(example_id=ids)
    parts = met.scores(tokens, method, groups="example_id") / len(tokens.dataset)
    places = np.searchsorted(np.unique(ids), ids)
    return [[0.0, *parts[:, place].tolist()] for place in places]


def _contributions(
    store: GradientRows, queries: GradientRows, method: Method, lines: Dataset
) -> tuple[list[int], Array, Array]:
    """When the listed examples contributed.

    Returns:
        steps (columns,), the examples' sorted ids (ids,) and scores summed by query,
        example and column (queries, ids, columns); nothing for rows without steps.
    """
    if "step" not in store.dataset.column_names:
        return [], np.empty(0), np.empty(0)
    met = store.where(example_id=lines.unique("example_id"))
    scores = met.scores(queries, method).nan_to_num_().double().numpy()
    ids, examples = np.unique(column(met.dataset, "example_id"), return_inverse=True)
    every = column(store.dataset, "step")
    edges = np.linspace(every.min(), every.max() + 1, _COLUMNS_OF_MAP + 1)
    edges = np.unique(edges.round().astype(int))
    places = np.digitize(column(met.dataset, "step"), edges) - 1
    sums = np.zeros((len(scores), len(ids), len(edges) - 1))
    for example, place, score in zip(examples, places, scores.T, strict=True):
        sums[:, example, place] += score
    if is_averaged(method):
        sums /= np.bincount(examples)[:, np.newaxis]
    return edges[:-1].tolist(), ids, sums
