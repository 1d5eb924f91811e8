"""Inner products of exact gradients, of parts of a model and of all of it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

REST = "all else"
_ROWS_AT_ONCE = 4


def exact_products(
    model: nn.Module,
    rows: Any,
    queries: Any,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    parts: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Inner products of each query's gradient with each row's, by part of the model.

    All gradients of the queries are held at once, those of rows a few at a time.

    Args:
        model: model that returns the mean loss of its inputs.
        rows: examples.
        queries: examples.
        collate: makes the model's inputs of a list of either.
        parts: prefixes of the names of each part's parameters, in which no two parts
            have one in common; what is in no part is one more. None for one part.

    Returns:
        name -> (queries, rows), of the parameters' type; their sum is the model's.
    """
    model.eval()
    members = parameters_by_part(model, parts or {})
    parameters = [p for group in members.values() for p in group]
    sizes = [sum(p.numel() for p in group) for group in members.values()]
    asked = parameters[0].new_empty(len(queries), sum(sizes))
    for line, gradient in zip(
        asked, gradients(model, parameters, queries, collate), strict=True
    ):
        line.copy_(gradient)
    products: list[list[Tensor]] = [[] for _ in members]
    for some in _stacked(gradients(model, parameters, rows, collate)):
        cut = zip(products, asked.split(sizes, 1), some.split(sizes, 1), strict=True)
        for found, left, right in cut:
            found.append(left @ right.T)
    return {
        name: torch.cat(found, 1) for name, found in zip(members, products, strict=True)
    }


def parameters_by_part(
    model: nn.Module, parts: Mapping[str, str]
) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters of each part, and those of none."""
    members: dict[str, list[nn.Parameter]] = {name: [] for name in parts}
    members[REST] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            homes = [part for part, prefix in parts.items() if name.startswith(prefix)]
            members[homes[0] if homes else REST].append(parameter)
    return {name: group for name, group in members.items() if group}


def gradients(
    model: nn.Module,
    parameters: list[nn.Parameter],
    examples: Any,
    collate: Callable[[list[Any]], Mapping[str, Any]],
) -> Iterator[Tensor]:
    """Each example's gradient, end to end in the order of the parameters."""
    for example in tqdm(examples, desc="Exact gradients", unit="example"):
        loss = model(**collate([example]))["loss"]
        parts = torch.autograd.grad(loss, parameters)
        yield torch.cat([part.flatten() for part in parts])


def _stacked(rows: Iterator[Tensor]) -> Iterator[Tensor]:
    """A few rows at a time, (at most _ROWS_AT_ONCE, n)."""
    some: list[Tensor] = []
    for row in rows:
        some.append(row)
        if len(some) == _ROWS_AT_ONCE:
            yield torch.stack(some)
            some = []
    if some:
        yield torch.stack(some)
