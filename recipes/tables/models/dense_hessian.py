"""Small models whose whole Hessian fits into memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from hf_sketch import ModelSketch
from hf_sketch.curvature.hessian import CurvatureOperator
from hf_sketch.curvature.vectors import Vector

_VOCABULARY, _TOKENS, _CLASSES = 64, 12, 3
_COLUMNS = 64  # of the Hessian, differentiated at a time
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_NO_DROPOUT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class DenseHessian(CurvatureOperator):
    """The Hessian of the mean loss, as a matrix.

    Args:
        model: the model, in float64, with eager attention.
        batches: inputs of the model, with labels.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(model, batches, mode="autograd")
        parameters = list(self.parameters.values())
        gradient = torch.autograd.grad(
            torch.stack([model(**batch).loss for batch in batches]).mean(),
            parameters,
            create_graph=True,
        )
        flat = torch.cat([part.flatten() for part in gradient])
        columns: list[Tensor] = []
        for unit in torch.eye(len(flat), dtype=flat.dtype).split(_COLUMNS):
            parts = torch.autograd.grad(
                flat, parameters, unit, retain_graph=True, is_grads_batched=True
            )
            columns.append(torch.cat([part.flatten(1) for part in parts], 1))
        matrix = torch.cat(columns)
        self.matrix = (matrix + matrix.T) / 2
        self.size, self.dtype, self.device = len(flat), flat.dtype, flat.device
        self._sketched: tuple[ModelSketch, Tensor] | None = None

    def __matmul__(self, vector: Vector | Tensor) -> Any:
        """Multiply by the parameters' vector, by name or end to end."""
        if isinstance(vector, Tensor):
            return self.matrix @ vector
        flat = self.matrix @ torch.cat([part.flatten() for part in vector.values()])
        parts = flat.split([part.numel() for part in vector.values()])
        pairs = zip(vector.items(), parts, strict=True)
        return {name: part.view_as(like) for (name, like), part in pairs}

    def sketched_product(self, model_sketch: ModelSketch, vector: Tensor) -> Tensor:
        """Return S @ H(S.T @ v), from the matrix S @ H @ S.T."""
        if self._sketched is None or self._sketched[0] != model_sketch:
            units = torch.eye(model_sketch.out_size, dtype=self.dtype)
            (packed,) = model_sketch.packed_operators.values()
            lifted = units @ packed
            self._sketched = model_sketch, lifted @ self.matrix @ lifted.T
        return self._sketched[1] @ vector


def tiny_model(
    name: str, width: int, steps: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a GPT-2 or a BERT classifier of two layers, in float64, and its batch.

    It is trained for some steps of AdamW on that one batch of random tokens.

    Args:
        name: "gpt2" | "bert".
        width: width of the hidden states.
        steps: number of steps.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, _VOCABULARY, (16, _TOKENS), generator=generator)
    batch = {"input_ids": ids, "labels": ids}
    settings: dict[str, Any] = {"vocab_size": _VOCABULARY, "num_hidden_layers": 2}
    settings |= {"hidden_size": width, "num_attention_heads": 2, **_NO_DROPOUT}
    settings |= {"attn_implementation": "eager", "max_position_embeddings": 20}
    settings |= {"bos_token_id": 1, "eos_token_id": 2}
    if name == "bert":
        settings |= {"intermediate_size": 2 * width, "num_labels": _CLASSES}
        batch["labels"] = torch.randint(_CLASSES, (16,), generator=generator)
    auto = (
        AutoModelForCausalLM if name == "gpt2" else AutoModelForSequenceClassification
    )
    model = auto.from_config(AutoConfig.for_model(name, **settings)).double().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, batch
