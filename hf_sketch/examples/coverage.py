"""How the gradients of a model's modules are read."""

from collections.abc import Iterable
from dataclasses import dataclass

from hf_sketch.examples.rules.base import NoRule, Rule


@dataclass(frozen=True)
class ModuleCoverage:
    """Which modules with trainable parameters have a rule, and which have none.

    Args:
        by_rule: paths of the modules whose inputs and output gradients are enough.
        run_again: paths of the modules whose calls are run again per example.
    """

    by_rule: tuple[str, ...]
    run_again: tuple[str, ...]

    @classmethod
    def of(cls, rules: Iterable[Rule]) -> "ModuleCoverage":
        """Return what some rules cover."""
        again = {rule.path: isinstance(rule, NoRule) for rule in rules}
        return cls(
            tuple(path for path, without in again.items() if not without),
            tuple(path for path, without in again.items() if without),
        )
