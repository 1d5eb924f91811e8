"""Gradients that were zero when compared, so that a rule is still unverified."""

from collections.abc import Mapping

from hf_sketch.examples.rules.base import kind_of

_TRIALS = 4


class ZeroGradients:
    """Parameters in shards whose gradients were zero whenever they were compared.

    LoRA's first factor has none until the second, which begins as zero, has trained.
    Whole parameters get other numbers for the trial; those in shards are tried again in
    later steps.
    """

    def __init__(self) -> None:
        self._zero, self._seen = set[str](), set[str]()
        self._trials = 0
        self.are_due = False  # whether to try again before the next batch

    def begin_trial(self) -> None:
        """Note that gradients are going to be compared."""
        self._trials, self.are_due = self._trials + 1, False

    def note(self, found: Mapping[str, bool]) -> None:
        """Note what was compared.

        Args:
            found: whether the gradient of any example was not zero, by parameter.
        """
        for name, is_seen in found.items():
            (self._seen if is_seen else self._zero).add(kind_of(name))
        self._zero -= self._seen

    def start_step(self) -> None:
        """Note that the optimizer may have stepped."""
        self.are_due = bool(self._zero) and self._trials < _TRIALS

    @property
    def given_up(self) -> str | None:
        """Why trials have ended; None if all was seen, or another trial may come."""
        if not self._zero or self._trials < _TRIALS:
            return None
        return f"the gradients of {min(self._zero)} were zero in {_TRIALS} trials"
