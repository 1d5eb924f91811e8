"""One guarded run: what is noted of its steps, and what is done about them."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer

from hf_sketch.attribution.questions.opposition import (
    FILE,
    MEASURES,
    GuardHistory,
    culprits,
    opposition,
)
from hf_sketch.examples.calls import IGNORED
from hf_sketch.processes import of_each, of_first, reduced

from ..recording.run import Run
from ..recording.trainers import wrap_method
from .guard_set import GuardSet, check_ignored_labels
from .lines import NOT_FINITE, Line, finite_values, lines_before, sentence_of


class GuardSettings(Protocol):
    """What a guard does, and when; see `GuardCallback`."""

    queries: Any
    every: int
    action: Any
    threshold: float
    window: int


class Watch:
    """Judges the steps of one run before the optimizer makes them.

    Every recorded step has a line in the file `guard.jsonl`, from which training that
    resumes restores what it compares with, and the quarantine.

    Args:
        settings: settings of the callback.
        trainer: the one that trains.
        run: records the rows.
        model: the model that trains.
        optimizer: the one that steps.
    """

    def __init__(
        self,
        settings: GuardSettings,
        trainer: Trainer,
        run: Run,
        model: nn.Module,
        optimizer: Optimizer,
    ) -> None:
        assert run.sketcher is not None
        self.state, self._run, self._settings = trainer.state, run, settings
        self._optimizer, self._args = optimizer, trainer.args
        self._parameters = list(run.sketcher.parameters.values())
        self._guard_set: GuardSet | None = None
        if settings.queries is not None:
            self._guard_set = GuardSet(trainer, settings.queries, model, run.sketcher)
        self._queries: Tensor | None = None
        self._batches: list[Mapping[str, Tensor]] = []
        self._lost = False  # a micro-batch has nothing but quarantined examples
        self._history = GuardHistory(settings.window)
        self._quarantined = set[int]()
        self._alarms, self._since_log = 0, list[float]()
        self._path = Path(trainer.args.output_dir or ".").resolve() / FILE
        for line in of_first(lines_before(self._path, trainer)):
            self._note(line)
        run.followers.append(self._add)
        if settings.action == "quarantine":
            check_ignored_labels(trainer, model, run.sketcher)
            undo = wrap_method(trainer, "compute_loss", self._compute_loss)
            run.closing.callback(undo)
        undo = wrap_method(trainer, "log", self._log)
        run.closing.callback(undo)

    def start_step(self) -> None:
        """Begin an optimizer step, at times with new sketches of the guard set."""
        self._batches.clear()
        self._lost = False
        due = self.state.global_step % self._settings.every == 0
        if self._guard_set is not None and (self._queries is None or due):
            self._queries = self._guard_set.sketched()

    def end_gradient(self) -> None:
        """Judge the step whose gradient is complete; all processes call together."""
        if self._run.is_recorded:
            self._judge()
        elif self._quarantined and bool(reduced(self._sums(), "sum")[-1]):
            forget_gradients(self._parameters, self._optimizer, self._args)

    def _judge(self) -> None:
        weight, *sums, broken, lost = reduced(self._sums(), "sum").tolist()
        if not (weight or broken or lost):
            return  # no example has a label
        values = {
            name: total / weight if weight else float("nan")
            for name, total in zip(MEASURES, sums, strict=True)
        }
        deviations = self._history.deviations(values)
        reasons = [n for n in MEASURES if deviations[n] > self._settings.threshold]
        if broken:
            reasons = [NOT_FINITE]
        elif self._guard_set is None and np.isnan(values["loss"]):
            raise ValueError(
                "The losses of examples are not known: they are computed outside the "
                "model. Pass queries to GuardCallback, which it judges gradients by."
            )
        line: Line = {"step": self.state.global_step + 1, **finite_values(values)}
        line |= finite_values(
            {f"{name}_deviation": x for name, x in deviations.items()}
        )
        line |= {"action": None, "reasons": reasons, "examples": []}
        if reasons or lost:
            line["action"] = self._settings.action
            line["examples"] = self._named(reasons)
            self._act(line)
        self._note(line)
        if self._queries is not None:
            self._since_log.append(values["opposition"])
        if self._args.process_index == 0:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _log(self, log: Callable[..., None], logs: Any, *args: Any, **kw: Any) -> None:
        """Call `Trainer.log`, with what was noted if it logs the training loss."""
        if "loss" in logs:
            logs["sketch/alarms"], self._alarms = self._alarms, 0
            if self._since_log:
                logs["sketch/opposition"] = float(np.mean(self._since_log))
                self._since_log = []
        log(logs, *args, **kw)

    def _compute_loss(
        self,
        compute: Callable[..., Any],
        model: nn.Module,
        inputs: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Call `Trainer.compute_loss`, without quarantined examples in training."""
        drawn = self._run.drawn or ()
        if model.training and not self._quarantined.isdisjoint(drawn):
            out = [i for i, one in enumerate(drawn) if one in self._quarantined]
            if len(out) == len(drawn):
                self._lost = True  # a mean over no labels is NaN
            else:
                labels = inputs["labels"].clone()
                if len(labels) != len(drawn):
                    raise _disordered()
                labels[out] = IGNORED
                inputs = {**inputs, "labels": labels}
        return compute(model, inputs, *args, **kwargs)

    def _add(self, columns: Mapping[str, Tensor]) -> None:
        """Note the rows of a micro-batch's examples.

        Raises:
            ValueError: they are to be quarantined, and lie in another order than that
                in which the sampler drew them.
        """
        drawn = [one for one in self._run.drawn or () if one is not None]
        quarantines = self._settings.action == "quarantine"
        if quarantines and columns["example_id"].tolist() != drawn:
            raise _disordered()
        names = ("example_id", "weight", "loss", "finite")
        kept = {name: columns[name] for name in names}
        if self._queries is None:
            kept["opposition"] = torch.full_like(kept["loss"], torch.nan)
            kept["query"] = torch.full_like(kept["example_id"], -1)
        else:
            rows = columns["sketch"].to(self._queries)
            kept["opposition"], kept["query"] = opposition(rows, self._queries)
        self._batches.append(kept)

    def _sums(self) -> Tensor:
        """Return sums of this step.

        Of weights, of weighted measures, of rows that are not finite and of lost
        micro-batches.
        """
        like = self._parameters[0]
        total = torch.zeros(len(MEASURES) + 3, device=like.device)
        for batch in self._batches:
            weight = batch["weight"].to(total)
            total[0] += weight.sum()
            for place, name in enumerate(MEASURES, 1):
                # 0 times NaN: an example without labels has no loss.
                own = torch.where(weight == 0, 0, weight * batch[name].to(total))
                total[place] += own.sum()
            total[-2] += batch["finite"].logical_not().sum().to(total)
        total[-1] = float(self._lost)
        return total

    def _named(self, reasons: Sequence[str]) -> list[Line]:
        """Return the examples of all processes that make the step stand out."""
        own: list[Line] = []
        for batch in self._batches:
            columns = [batch[name].tolist() for name in batch]
            lines = [
                dict(zip(batch, x, strict=True)) for x in zip(*columns, strict=True)
            ]
            own += [line for line in lines if line["weight"] or not line["finite"]]
        everyone = [line for lines in of_each(own) for line in lines]
        found: dict[int, Line] = {}
        for reason in reasons:
            if reason == NOT_FINITE:
                found = {
                    place: {**line, "reasons": [NOT_FINITE]}
                    for place, line in enumerate(everyone)
                    if not line["finite"]
                }
                continue
            values = [line[reason] for line in everyone]
            weights = [line["weight"] for line in everyone]
            usual = self._history.usual(reason)
            for place in culprits(values, weights, usual).tolist():
                found.setdefault(place, {**everyone[place], "reasons": []})
                found[place]["reasons"].append(reason)
        return [finite_values(line) for line in found.values()]

    def _act(self, line: Line) -> None:
        """Do what the callback is to do about a step that stands out."""
        self._alarms += 1
        if self._settings.action in ("skip", "quarantine"):
            forget_gradients(self._parameters, self._optimizer, self._args)
        if self._settings.action != "log" and self._args.process_index == 0:
            warnings.warn(sentence_of(line), stacklevel=2)

    def _note(self, line: Line) -> None:
        """Keep what later steps need of a line."""
        values = {name: line[name] for name in MEASURES if line[name] is not None}
        if NOT_FINITE not in line["reasons"]:
            self._history.add(values)
        if line["action"] == "quarantine":
            self._quarantined |= {one["example_id"] for one in line["examples"]}


def _disordered() -> ValueError:
    return ValueError(
        'action="quarantine" needs one row per example, in the order in which the '
        "sampler drew them, but the collator or the Trainer changes the rows. Pass "
        "action='skip'."
    )


def forget_gradients(
    parameters: Sequence[Tensor], optimizer: Optimizer, args: Any
) -> None:
    """Take all gradients away, so that the optimizer changes nothing at its step.

    Optimizers of torch pass over parameters without a gradient: no weight decay, and
    neither momentum nor step count change.

    Args:
        parameters: what is trained.
        optimizer: the one that is about to step, with a `scaler` under fp16.
        args: settings of the Trainer.
    """
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None and not args.max_grad_norm:
        # The scaler wants to have seen gradients; clipping would have shown them.
        scaler.unscale_(getattr(optimizer, "optimizer", optimizer))
    for parameter in parameters:
        parameter.grad = None
