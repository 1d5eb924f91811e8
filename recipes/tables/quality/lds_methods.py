"""Scores of this library's methods, and of their exact counterparts."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_sketch import (
    GradientRows,
    HessianOperator,
    Influence,
    ModelSketch,
    SketchedHessian,
    Spectrum,
    hessian_spectrum,
    sketch_dataset,
)
from hf_sketch.recipes.tables.models.exact_products import REST, exact_products
from hf_sketch.recipes.tables.quality.lds_training import Snapshot, Task, example_losses


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        method: what makes the scores.
        out_size: numbers of a sketch or projection, None without.
        damping: as a part of what the method takes it of, None without.
        groups: groups of layers that share the numbers of a sketch.
    """

    method: str
    out_size: int | None = None
    damping: float | None = None
    groups: int = 1

    def __str__(self) -> str:
        damping = "" if self.damping is None else f", damping {self.damping:g}"
        groups = "" if self.groups == 1 else f", {self.groups} groups"
        return self.method + damping + groups


Scores = Iterator[tuple[Row, Tensor]]  # each (queries, rows)


def same_labels(task: Task) -> Tensor:
    """1 for rows with the query's label: what the classes' frequencies foretell.

    Shapes:
        returns (queries, rows)
    """
    rows, queries = (
        torch.tensor([int(one["labels" if "labels" in one else "label"]) for one in of])
        for of in _sets(task)
    )
    return (queries.unsqueeze(1) == rows).double()


def exact_scores(
    task: Task, model: nn.Module, dampings: list[float], gram: bool
) -> Scores:
    """By exact gradients.

    Args:
        task: its rows and queries.
        model: trained model.
        dampings: dampings of the preconditioned score.
        gram: products of all pairs of rows as well, whose gradients must fit into
            memory, for the cosine and the preconditioned score.
    """
    products = partial(exact_products, model, task.rows, collate=task.collate)
    dot = products(task.queries)[REST].double()
    yield Row("exact dot"), dot
    if not gram:
        return
    between = products(task.rows)[REST].double()
    yield Row("exact cosine"), dot / between.diagonal().sqrt()
    yield from (
        (
            Row("exact preconditioned, last state", None, damping),
            fisher_influence(dot, between, damping),
        )
        for damping in dampings
    )


def fisher_influence(dot: Tensor, between: Tensor, damping: float) -> Tensor:
    """Scores by the inverse of C + damping * trace(C) / rows, C the mean of r r^T.

    By the identity of Woodbury it takes the rows' products only.

    Shapes:
        dot (queries, rows), between (rows, rows) -> (queries, rows)
    """
    count = len(between)
    damped = between.clone()
    damped.diagonal().add_(damping * float(between.trace()) / count)
    return count * torch.linalg.solve(damped, dot, left=False)


def sketched_scores(
    task: Task, snapshots: list[Snapshot], sketch: ModelSketch, how: "How"
) -> Scores:
    """By sketches of one size and seed, at the last snapshot but for TracIn.

    With groups of layers there is no influence, which needs a single sketch of all.
    """

    def both(state: nn.Module) -> tuple[GradientRows, GradientRows]:
        rows, queries = (sketched(task, state, of, sketch) for of in _sets(task))
        return rows, queries

    size, last = sketch.row_size, snapshots[-1]
    groups = sketch.layer_groups.count
    rows, queries = both(last.model)
    dot = rows.scores(queries, "dot")
    yield Row("dot", size, None, groups), dot
    yield Row("cosine", size, None, groups), rows.scores(queries, "cosine")
    for damping in how.dampings:
        scores = rows.scores(queries, rows.preconditioned(damping))
        yield Row("preconditioned, last state", size, damping, groups), scores
    run = task.record(sketch)
    for damping in how.dampings:
        method = run.preconditioned(damping)
        scores = run.scores(queries, method, "example_id")
        yield Row("preconditioned", size, damping, groups), scores
    scores = run.scores(queries, "tracin", "example_id")
    yield Row("tracin over the run", size, None, groups), scores
    if how.influence_dampings and groups == 1:
        spectrum = spectrum_of(task, last.model, sketch, how)
        for damping in how.influence_dampings:
            scores = rows.scores(queries, Influence(spectrum, damping))
            yield Row("influence", size, damping), scores
    tracin = last.learning_rate * dot
    for snapshot in snapshots[:-1]:
        rows, queries = both(snapshot.model)
        tracin += snapshot.learning_rate * rows.scores(queries, "dot")
    yield Row("tracin", size, None, groups), tracin


@dataclass(frozen=True)
class How:
    """Settings of the methods.

    Args:
        dampings: dampings of the preconditioned score.
        influence_dampings: dampings of the influence functions.
        krylov_dim: Lanczos steps of the Hessian's spectrum.
        keep_vectors: eigenvectors that influence uses.
        hessian_rows: the first rows, of whose loss the Hessian is.
    """

    dampings: list[float]
    influence_dampings: list[float]
    krylov_dim: int
    keep_vectors: int
    hessian_rows: int


def sketched(
    task: Task, model: nn.Module, examples: Any, sketch: ModelSketch
) -> GradientRows:
    """The examples' gradients."""
    return sketch_dataset(
        model,
        examples,
        sketch,
        batch_size=task.batch_at_once,
        data_collator=task.collate,
        loss_fn=example_losses,
    )


def spectrum_of(
    task: Task, model: nn.Module, sketch: ModelSketch, how: How
) -> Spectrum:
    """Of the Hessian of the rows' loss, sketched."""
    batches = task.batches(how.hessian_rows)
    hessian = HessianOperator(model, batches, self_check=task.smooth)
    return hessian_spectrum(
        SketchedHessian(hessian, sketch),
        how.krylov_dim,
        keep_vectors=how.keep_vectors,
    )


def _sets(task: Task) -> tuple[Any, Any]:
    return task.rows, task.queries
