"""Hessians of real models without a sketch, and batches to take them on."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from hf_sketch import HessianOperator
from hf_sketch.recipes.placement import device
from hf_sketch.recipes.texts.entailment import load_pairs, tokenize
from hf_sketch.recipes.texts.minilm import embedded_model_path


class FlatHessian:
    """A Hessian as an operator on vectors of all parameters end to end.

    Its Krylov vectors have the model's size: for small models, and to compare with.

    Args:
        hessian: Hessian of the model.
    """

    def __init__(self, hessian: HessianOperator) -> None:
        self.hessian = hessian
        self._sizes = [p.numel() for p in hessian.parameters.values()]
        like = next(iter(hessian.parameters.values()))
        self.size = sum(self._sizes)
        self.dtype, self.device = like.dtype, like.device

    def __matmul__(self, v: Tensor) -> Tensor:
        product = self.hessian @ self.named(v)
        return torch.cat([part.reshape(-1) for part in product.values()])

    def named(self, v: Tensor) -> dict[str, Tensor]:
        """A vector cut into the parameters' shapes."""
        parameters = self.hessian.parameters
        parts = zip(parameters, v.split(self._sizes), strict=True)
        return {name: part.view_as(parameters[name]) for name, part in parts}


def entailment_batches(
    examples: int, batch_size: int, train_file: str | None = None
) -> list[dict[str, Tensor]]:
    """Padded batches of pairs with labels, as MiniLM takes them.

    Args:
        examples: the first pairs of the training set.
        batch_size: pairs per batch.
        train_file: premise, hypothesis, label; by default our own pairs.
    """
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    pairs = load_pairs("train", train_file).select(range(examples))
    data = tokenize(pairs, tokenizer)
    batches: list[dict[str, Tensor]] = []
    for low in range(0, examples, batch_size):
        rows = data.select(range(low, min(low + batch_size, examples)))
        columns = {name: rows[name][:] for name in ("input_ids", "attention_mask")}
        batch = dict(tokenizer.pad(columns, return_tensors="pt"))
        batches.append({**batch, "labels": torch.tensor(rows["label"][:])})
    return batches


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Mean over the eigenvalues of |got - exact| / |exact|; both in the same order."""
    return float(((got - exact) / exact).abs().mean())


def random_tokens(
    model: torch.nn.Module, examples: int, tokens: int
) -> Sequence[Mapping[str, Any]]:
    """One batch of random text of full length."""
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (examples, tokens), generator=generator).to(
        device()
    )
    return [{"input_ids": ids, "labels": ids}]
