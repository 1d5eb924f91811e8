"""What a model's head makes of logits before their softmax."""

from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

_NEWTON_STEPS: Final = 12


@dataclass(frozen=True)
class HeadScores:
    """What makes scores of logits: softcap * tanh(scale * logits / softcap) / T.

    Args:
        scale: a factor of the logits.
        softcap: bound of the scores before the temperature divides them; None for none.
        temperature: T.
    """

    scale: float
    softcap: float | None
    temperature: float = 1.0

    @classmethod
    def of(cls, model: Any) -> "HeadScores":
        config: Any = getattr(model, "config", None)
        config = None if config is None else config.get_text_config()
        scale = 1.0
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
            value = getattr(config, name, None)
            scale = value if isinstance(value, float) else scale
        divisor = getattr(config, "logits_scaling", None)
        scale = 1 / divisor if isinstance(divisor, (int, float)) else scale
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return scores and their derivatives."""
        scale = self.scale / self.temperature
        if self.softcap is None:
            return logits if scale == 1 else scale * logits, scale
        bounded = torch.tanh(logits * (self.scale / self.softcap))
        slope = (1 - bounded.square()).mul_(scale)
        return bounded.mul_(self.softcap / self.temperature), slope

    def fitted(self, logits: Tensor, labels: Tensor, log_probs: Tensor) -> "HeadScores":
        """Return the same with the temperature that the log-probabilities tell.

        Fit by Gauss-Newton, and left at 1 where rounding explains the difference.

        Shapes:
            logits (t, vocabulary), labels (t,), log_probs (t,)
        """
        scores, _ = self(logits.double())
        inverse, deviation = 1.0, 0.0
        for _ in range(_NEWTON_STEPS):
            got = (inverse * scores).log_softmax(-1)
            error = got.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - log_probs
            own = scores.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            slope = own - (got.exp_() * scores).sum(-1)
            inverse -= float(slope @ error / (slope @ slope))
            deviation = float(error.norm() / slope.norm() / len(error) ** 0.5)
        is_one = not abs(inverse - 1) > 3 * deviation + 1e-5
        return self if is_one else replace(self, temperature=self.temperature / inverse)
