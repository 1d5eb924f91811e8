"""The settings of fine-tuning in a sketched subspace, as PEFT keeps them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import version
from typing import Any, Final

from packaging.version import Version
from peft import PeftConfig
from peft.utils.constants import (
    DUMMY_TARGET_MODULES,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
)

from hf_sketch.sketches.choices import check_count, check_flag


class SubspaceType(str, Enum):
    """The type of the method; PEFT's own enumeration cannot be extended."""

    SUBSPACE = "SUBSPACE"


PEFT_TYPE: Any = SubspaceType.SUBSPACE
_LEAST_PEFT: Final = "0.21"

Names = list[str] | str | None


@dataclass
class SubspaceConfig(PeftConfig):
    """Fine-tune a whole model in a sketched subspace of few dimensions.

    The parameters are theta0 + S.T omega, where theta0 are the base model's and the
    `dim` numbers omega are all that trains. S is drawn from the seed. A `dim` below
    `max_dim` uses the first rows of one S, so that it contains every smaller one. A
    step of Adam moves each parameter by about the learning rate at `max_dim`, and by
    sqrt(dim / max_dim) of that below.

        model = get_peft_model(model, SubspaceConfig(dim=2**13))

    The base model keeps its parameters; theta0 + S.T omega is a second copy of those
    that move, which modules use in forward and backward passes.

    Args:
        dim: length of omega.
        max_dim: largest dimension that `grow_subspace` may grow the subspace to; None
            for `dim`. Sketching needs working memory for that many numbers.
        operator: "srht", "affd", "afjl", "fjl", "qk", "ffd" or "dense". The default is
            "srht", or "affd" if the subspace can grow, since its first rows reach every
            parameter.
        layout: "grouped", "blocked", "factored" or "flat", see `ModelSketch`. The
            default is "blocked" if an operator is passed or the subspace can grow, else
            "grouped".
        seed: draws S.
        target_parameters: names of the parameters that move, whole or their last parts
            (["weight"] for all weights), or a regular expression for the whole name;
            None for all that the base model trains: embeddings, heads, norms, biases.
        exclude_parameters: names of parameters left out, in the same forms. Those that
            are frozen when the adapter is made are added to it.
        target_modules: names of the modules whose parameters move, with those of the
            modules in them, in the same forms; None for all. With `target_parameters`,
            a parameter moves if both name it.
        exclude_modules: names of modules whose parameters are left out, in the same
            forms.
        modules_to_save: modules that are trained and saved in full beside omega. PEFT
            adds the heads of classifiers if `task_type` is given.
        base_fingerprint: digest of theta0, filled in when the adapter is made and
            checked when it is loaded. None loads it on any base model.
        base_on_disk: keep the copy of theta0 in temporary files (`TMPDIR`), which the
            system reads when omega moves, instead of in memory. The base model's
            parameters then hold theta, not theta0, between forward passes.
        init_weights: start from the base model, with omega zero; False draws a small
            random omega, for tests.

    Raises:
        ValueError: a size, an operator or a layout is bad.
        ImportError: PEFT is older than 0.21, which does not run the model's hooks.

    Reference:
        Schioppa 2024, arXiv:2402.03994, section 4.
    """

    dim: int = 2**13
    max_dim: int | None = None
    operator: str | None = None
    layout: str | None = None
    seed: int = 0
    target_parameters: Names = None
    exclude_parameters: Names = None
    modules_to_save: list[str] | None = None
    base_fingerprint: str | None = None
    base_on_disk: bool = False
    target_modules: Names = None
    exclude_modules: Names = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if Version(version("peft")) < Version(_LEAST_PEFT):
            raise ImportError(
                f"SubspaceConfig needs peft>={_LEAST_PEFT}, got {version('peft')}: "
                f"pip install -U 'peft>={_LEAST_PEFT}'."
            )
        self.peft_type = PEFT_TYPE
        check_count("dim", self.dim)
        check_count("max_dim", self.max_dim, optional=True)
        check_count("seed", self.seed, least=0)
        grows = self.largest_dim > self.dim
        if self.layout is None:
            given = grows or self.operator is not None
            self.layout = "blocked" if given else "grouped"
        if self.operator is None:
            self.operator = "affd" if grows else "srht"
        check_flag("base_on_disk", self.base_on_disk)
        check_flag("init_weights", self.init_weights)
        if self.target_modules == DUMMY_TARGET_MODULES:  # as older files have
            self.target_modules = None
        if self.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            raise ValueError(
                "target_modules must be names of modules or a regular expression, got "
                f"{self.target_modules!r}: leave it out to move all parameters, or "
                "pass target_parameters=['weight']."
            )
        if self.dim > self.largest_dim:
            raise ValueError(
                f"dim must be in [1, max_dim={self.largest_dim}], got {self.dim}. Pass "
                "a max_dim that is not below it."
            )

    @property
    def largest_dim(self) -> int:
        """Length of the vectors that the sketch maps to."""
        return self.dim if self.max_dim is None else self.max_dim

    def covers(self, name: str) -> bool:
        """Whether a parameter of this name is among those that move."""
        targets = self.target_parameters
        if targets is not None and not matches(name, targets):
            return False
        if matches(name, self.exclude_parameters or ()):
            return False
        parts = name.split(".")[:-1]
        modules = [".".join(parts[:count]) for count in range(len(parts) + 1)]
        for module in modules:
            if matches(module, self.exclude_modules or ()):
                return False
            if any(f".{key}." in f".{module}." for key in self.modules_to_save or ()):
                return False
        targets = self.target_modules
        return targets is None or any(matches(module, targets) for module in modules)


def matches(name: str, names: Sequence[str] | str) -> bool:
    """Whether a name is, or ends in, one of a list, or fits a pattern."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == other or name.endswith(f".{other}") for other in names)
