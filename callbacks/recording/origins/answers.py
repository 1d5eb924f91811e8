"""Rewards and advantages of the answers that a Trainer generates, as TRL's do."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..trainers import wrap_method

# Of GRPOTrainer and RLOOTrainer, as read in TRL 1.0 to 1.16.
_JUDGING, _SCORING = "_calculate_rewards", "_generate_and_score_completions"
_REWARDS, _ADVANTAGES = "hf_sketch_rewards", "advantages"


def generates_answers(trainer: Trainer) -> bool:
    """Return whether a Trainer generates answers, and judges them by rewards."""
    names = (_JUDGING, _SCORING, "reward_weights")
    return all(hasattr(trainer, name) for name in names)


class Answers:
    """Follows rewards and advantages from the answers to the rows of a batch.

    The Trainer scores many answers at once, shuffles them, and cuts them into the
    batches of several steps. Rewards are put among what it keeps for each answer, so
    that its loss gets them with the advantages.

    Args:
        trainer: the one that trains.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Any = trainer
        self._rewards: Tensor | None = None
        self._inputs: Mapping[str, Any] = {}

    def watch(self) -> Callable[[], None]:
        """Follow the Trainer's answers, and return what ends that."""
        wrappers = {
            _JUDGING: self._judge,
            _SCORING: self._score,
            "compute_loss": self._compute_loss,
        }
        with ExitStack() as undo:
            if generates_answers(self._trainer):
                for name, wrapper in wrappers.items():
                    undo.callback(wrap_method(self._trainer, name, wrapper))
            return undo.pop_all().close

    def columns(self, rows: int) -> dict[str, Tensor]:
        """Return the columns of the latest batch; NaN where they are not known."""
        inputs, self._inputs = self._inputs, {}
        keys = {"reward": _REWARDS, "advantage": _ADVANTAGES}
        return {name: _of_rows(inputs.get(key), rows) for name, key in keys.items()}

    def _judge(self, judge: Callable[..., Any], answers: Any, *args: Any) -> Any:
        """Keep the rewards of this process's answers: of each, the weighted sum."""
        found = judge(answers, *args)
        self._rewards = None
        if isinstance(found, Tensor) and found.dim() == 2:
            weighted = found * self._trainer.reward_weights.to(found)
            rewards = weighted.nansum(1).where(~found.isnan().all(1), torch.nan)
            start = self._trainer.accelerator.process_index * len(answers)
            self._rewards = rewards[start : start + len(answers)]
        return found

    def _score(self, score: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Put the rewards among what is kept for each answer."""
        scored = score(*args, **kwargs)
        rewards, self._rewards = self._rewards, None
        if rewards is None or len(rewards) != len(scored[_ADVANTAGES]):
            return scored
        return {**scored, _REWARDS: rewards}

    def _compute_loss(
        self,
        compute_loss: Callable[..., Any],
        model: Any,
        inputs: Mapping[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Keep what the loss is computed of."""
        self._inputs = inputs
        return compute_loss(model, inputs, *args, **kwargs)


def _of_rows(value: Any, rows: int) -> Tensor:
    """Return one number per row, NaN if there are others."""
    if isinstance(value, Tensor) and value.shape == (rows,):
        return value.detach().float()
    return torch.full((rows,), torch.nan)
