"""What methods of fine-tuning are compared on: rows, training and accuracy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup, set_seed

_WARM_UP: Final = 0.1  # of the steps
_EVALUATION_BATCH: Final = 100
_WINDOW: Final = 16  # batches whose rows are sorted by length together
_PADDED: Final = ("inputs_embeds", "input_ids", "attention_mask")


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows as a model reads them.

    Shapes:
        inputs by name, (rows, ...): "attention_mask" (rows, length), and "labels", -100
            where there is none
    """

    inputs: Mapping[str, Tensor]

    @property
    def lengths(self) -> Tensor:
        """The number of each row's tokens: (rows,)."""
        return self.inputs["attention_mask"].sum(1)

    def batch(self, own: Tensor) -> dict[str, Tensor]:
        """Return the model's inputs for some rows, without padding common to all."""
        length = int(self.lengths[own].max())
        return {
            name: x[own, :length] if name in _PADDED else x[own]
            for name, x in self.inputs.items()
        }

    def batches(self, steps: int, size: int) -> list[Tensor]:
        """Return the rows of random batches, each of rows of similar lengths."""
        lengths, batches = self.lengths, []
        while len(batches) < steps:
            for window in torch.randperm(len(lengths)).split(_WINDOW * size):
                inside = window[lengths[window].argsort()].split(size)
                batches += [inside[i] for i in torch.randperm(len(inside))]
        return batches[:steps]

    def part(self, own: slice) -> "Rows":
        """Return some rows."""
        return Rows({name: x[own] for name, x in self.inputs.items()})


@dataclass(frozen=True, eq=False)
class PeersTask:
    """What all methods learn.

    Args:
        model: what adapters are added to.
        train: rows of training.
        tuning: rows that choose the learning rate.
        test: rows of the reported accuracy.
    """

    model: nn.Module
    train: Rows
    tuning: Rows
    test: Rows

    def fit(
        self, model: nn.Module, rate: float, seed: int, steps: int, batch: int
    ) -> None:
        """Train with AdamW, a linear schedule and no weight decay."""
        set_seed(seed)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0)
        schedule = get_linear_schedule_with_warmup(
            optimizer, int(_WARM_UP * steps), steps
        )
        model.train()
        for own in self.train.batches(steps, batch):
            model(**self.train.batch(own)).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@torch.no_grad()
def measured(model: nn.Module, rows: Rows) -> tuple[float, float]:
    """Return the mean loss and the accuracy over all labels, of rows or of tokens."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for own in rows.lengths.argsort().split(_EVALUATION_BATCH):
        batch = rows.batch(own)
        output = model(**batch)
        labels = batch["labels"]
        there = labels >= 0
        loss += float(output.loss) * int(there.sum())
        right += int((output.logits.argmax(-1) == labels)[there].sum())
        count += int(there.sum())
    return loss / count, right / count
