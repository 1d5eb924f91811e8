"""Whether the rows of one class are right."""

import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.recipes.tables.census.attempt import Attempt
from hf_sketch.recipes.tables.census.configs import config_of
from hf_sketch.recipes.tables.census.inputs import Example, collate, examples_for
from hf_sketch.recipes.tables.census.tasks import Case

EXAMPLES = 9  # the last batch of three has one example
BATCH = 4
TOLERANCE = 1e-3
OUT_SIZE = 512
_MOST_ELEMENTS = 1_000_000

Outcome = Literal["right", "refused", "wrong", "crash", "timeout", "not trained"]
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """What became of a class.

    Args:
        task: the case's.
        kind: the case's.
        name: the case's.
        outcome: "right" if every row is; "refused" if the package raised a ValueError
            before any row; "not trained" if the class does not train without it.
        reason: why the outcome is another than "right", in a line.
        mixes: whether the gradient of a batch is no weighted sum of its examples' own.
        worst: least cosine of a row with the sketch of its example's own gradient.
        inputs: names of what the model was called with.
        seconds: time that the class took.
        trace: the innermost frames of an error.
    """

    task: str
    kind: str
    name: str
    outcome: Outcome
    reason: str = ""
    mixes: bool = False
    worst: float | None = None
    inputs: str = ""
    seconds: float = 0.0
    trace: str = ""


class NotTrainedError(Exception):
    """The class does not train without the callback."""


@dataclass(frozen=True)
class Alone:
    """What passes without the callback gave.

    Args:
        gradients: each example's own.
        losses: each example's own.
        mixes: see `Verdict`.
    """

    gradients: Sequence[Gradients]
    losses: Sequence[float]
    mixes: bool


def judge(case: Case) -> Verdict:
    """Train a tiny model of the class, without the callback and with it."""
    start = time.perf_counter()
    verdict = Verdict(case.task, case.kind, case.name, "right")
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        with Attempt() as trial:
            model = tiny_model(case)
            examples = examples_for(case.task, model, EXAMPLES)
            verdict = replace(verdict, inputs=" ".join(collate(examples[:1])))
            alone = train_alone(model, examples, f"{folder}/without")
            verdict = replace(verdict, mixes=alone is None or alone.mixes)
            verdict = _train_with_rows(verdict, model, examples, alone, folder)
        if trial.error is not None:
            verdict = _failed(verdict, "not trained", trial)
    return replace(verdict, seconds=round(time.perf_counter() - start, 2))


def tiny_model(case: Case) -> PreTrainedModel:
    """Return a model without dropout, whose every parameter matters.

    Raises:
        NotTrainedError: the configuration is not tiny.
    """
    model_class = case.model_class
    config = config_of(model_class)
    with torch.device("meta"):
        elements = sum(p.numel() for p in model_class(config).parameters())
    if elements > _MOST_ELEMENTS:
        raise NotTrainedError(f"the tiny model has {elements:,} parameters")
    torch.manual_seed(0)
    model = model_class(config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.unique().numel() <= 1:
            # Zeros and ones hide errors in what they multiply.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * noise.to(parameter)
    return model.float()


def train_alone(
    model: PreTrainedModel, examples: Sequence[Example], folder: str
) -> Alone | None:
    """Train a step without the callback, and return the examples' own gradients.

    Returns:
        None if the model takes no batch of one.

    Raises:
        NotTrainedError: the loss is random or not finite.
    """
    trainer = _trainer(model, examples[:BATCH], folder)
    trainer.train()
    loss, together = _own(trainer, examples[:BATCH])
    again, _ = _own(trainer, examples[:BATCH])
    if abs(again - loss) > 1e-5 * abs(loss):
        raise NotTrainedError("its loss is random in training, even without dropout")
    try:
        passes = [_own(trainer, [example]) for example in examples]
    except ValueError:  # by BatchNorm
        return None
    gradients = [gradient for _, gradient in passes]
    mixes = _mixes(together, gradients[:BATCH])
    return Alone(gradients, [loss for loss, _ in passes], mixes)


def compared(
    rows: Mapping[int, tuple[Tensor, float]],
    sketches: Sequence[Tensor],
    losses: Sequence[float],
) -> list[str]:
    """Return what is wrong with rows, given the sketches of the own gradients.

    Args:
        rows: each example's row and recorded loss, by id.
        sketches: each example's own.
        losses: each example's own; compared, as the norms are, where the recorded loss
            is a number.
    """
    if sorted(rows) != list(range(len(sketches))):
        return [f"rows of the examples {sorted(rows)}"]
    smallest = 1e-5 * max(float(sketch.norm()) for sketch in sketches)
    wrong: list[str] = []
    for index, (own, own_loss) in enumerate(zip(sketches, losses, strict=True)):
        row, loss = rows[index]
        if own.norm() <= smallest:  # a gradient that vanishes has no direction
            right = bool(row.norm() <= 10 * smallest)
            wrong += [] if right else [f"row {index} is of a gradient of zero"]
            continue
        cosine, ratio = _cosine(own, row), float(row.norm() / own.norm())
        if cosine < 1 - TOLERANCE:
            wrong.append(f"row {index} has cosine {cosine:.4f}")
        elif loss == loss and abs(ratio - 1) > TOLERANCE:
            wrong.append(f"row {index} has {ratio:.4f} times its norm")
        elif loss == loss and abs(loss - own_loss) > TOLERANCE * abs(own_loss):
            wrong.append(f"row {index} has loss {loss:.4f}, alone {own_loss:.4f}")
    return wrong


def _train_with_rows(
    verdict: Verdict,
    model: PreTrainedModel,
    examples: Sequence[Example],
    alone: Alone | None,
    folder: str,
) -> Verdict:
    """Train with the callback and compare."""
    if alone is None:
        examples = examples[: len(examples) // BATCH * BATCH]
    callback = GradientSketchCallback(OUT_SIZE)
    trainer = _trainer(model, examples, folder, callbacks=[callback])
    with Attempt() as training:
        trainer.train()
    if training.error is not None:
        has_rows = any(Path(folder).glob("sketches/per_example*"))
        refused = isinstance(training.error, ValueError) and training.is_ours
        return _failed(
            verdict, "refused" if refused and not has_rows else "crash", training
        )
    if alone is None:
        return replace(verdict, outcome="wrong", reason="rows of a batch that mixes")
    store = load_sketches(folder)
    rows = {
        row["example_id"]: (torch.tensor(row["sketch"]), row["loss"])
        for row in store.dataset
    }
    sketches = [store.model_sketch.sketch(g).float() for g in alone.gradients]
    wrong = compared(rows, sketches, alone.losses)
    worst = min(_cosine(own, rows[i][0]) for i, own in enumerate(sketches) if i in rows)
    outcome: Outcome = "wrong" if wrong else "right"
    return replace(verdict, outcome=outcome, reason="; ".join(wrong[:2]), worst=worst)


def _own(trainer: Trainer, examples: Sequence[Example]) -> tuple[float, Gradients]:
    """Return the loss and the gradients of a batch of these examples."""
    model: Any = trainer.model
    model.train()
    model.zero_grad()
    loss = trainer.compute_loss(model, collate(examples))
    if not bool(loss.isfinite()):
        raise NotTrainedError(f"its loss is {float(loss)}")
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad()
    if not all(bool(g.isfinite().all()) for g in gradients.values()):
        raise NotTrainedError("its gradient is not finite")
    return float(loss), gradients


def _mixes(together: Gradients, alone: Sequence[Gradients]) -> bool:
    """Return whether a batch's gradient is no weighted sum of its examples'."""
    columns = torch.stack([_flat(gradients) for gradients in alone], 1)
    columns = columns / columns.norm(dim=0).clamp(min=1e-30)
    wanted = _flat(together)[:, None]
    weights = torch.linalg.lstsq(columns, wanted).solution
    rest = (columns @ weights - wanted).norm()
    return bool(rest > TOLERANCE * wanted.norm())


def _flat(gradients: Gradients) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()]).double()


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one, other, dim=0))


def _failed(verdict: Verdict, outcome: Outcome, attempt: Attempt) -> Verdict:
    """Return the verdict of an attempt that raised an error."""
    known = isinstance(attempt.error, NotTrainedError)
    reason = str(attempt.error) if known else attempt.reason
    return replace(verdict, outcome=outcome, reason=reason, trace=attempt.trace)


def _trainer(
    model: PreTrainedModel, examples: Sequence[Example], folder: str, **settings: Any
) -> Trainer:
    """Return a Trainer that moves nothing and says nothing."""
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model, arguments, data_collator=collate, train_dataset=examples, **settings
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
