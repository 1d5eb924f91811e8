"""Options of the study of datamodeling scores."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hf_sketch.recipes.saved_report import ReportArguments
from hf_sketch.recipes.training_defaults import with_small

_SNLI = {
    "rows": 240,
    "queries": 40,
    "subsets": 50,
    "seeds": 1,
    "epochs": 3,
    "out_sizes": "1024,4096",
    "sketch_seeds": 1,
    "snapshots": 2,
    "krylov_dim": 20,
    "keep_vectors": 10,
    "hessian_rows": 16,
}
_TINY = {
    "rows": 24,
    "queries": 3,
    "subsets": 4,
    "seeds": 1,
    "epochs": 1,
    "out_sizes": "128",  # traker loses a projection matrix of at most 100 columns
    "sketch_seeds": 1,
    "snapshots": 1,
    "krylov_dim": 4,
    "keep_vectors": 2,
    "hessian_rows": 8,
    "dampings": "1",
    "influence_dampings": "0.1",
    "peer_dampings": "0.1",
    "hessian_dampings": "",
}
_LANGUAGE = {
    "queries": 100,
    "seeds": 1,
    "epochs": 3,
    "out_sizes": "1024,4096",
    "sketch_seeds": 1,
    "influence_dampings": "",
}
_SETTINGS = {
    "digits": {},
    "snli_head": {"epochs": 3},
    "snli": _SNLI,
    "language": _LANGUAGE,
}


@dataclass
class TaskArguments(ReportArguments):
    """A training that is repeated on other rows, and its queries."""

    task: str = field(default="digits", metadata={"help": "digits or snli_head."})
    train_file: str | None = field(
        default=None, metadata={"help": "SNLI rows instead of our own pairs."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "The same, for queries."}
    )
    rows: int = field(default=1000, metadata={"help": "Rows of the training set."})
    queries: int = field(default=200, metadata={"help": "Number of held-out queries."})
    epochs: int = field(default=0, metadata={"help": "Passes; 0 for the task's own."})
    tiny: bool = field(default=False, metadata={"help": "A few rows, as a check."})

    @property
    def shared(self) -> dict[str, Any]:
        """What another script is given that repeats the same training."""
        return {each.name: getattr(self, each.name) for each in fields(TaskArguments)}


@dataclass
class LdsArguments(TaskArguments):
    """Linear datamodeling scores (LDS) of this library's methods and of other packages.

    Models are retrained on random halves of the training set; the LDS is the rank
    correlation, over these halves, of a query's losses with the sums of its scores.
    """

    task: str = field(
        default="digits",
        metadata={
            "help": "digits (a perceptron), snli_head (on the frozen MiniLM), snli "
            "(all of MiniLM, smaller settings) or language (a causal language model)."
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder of a model, for language."}
    )
    epochs: int = field(default=30, metadata={"help": "Passes of each training."})
    subsets: int = field(default=100, metadata={"help": "Random halves trained on."})
    seeds: int = field(default=2, metadata={"help": "Models of each; losses' mean."})
    out_sizes: str = field(default="256,1024", metadata={"help": "Sketch sizes."})
    groups: str = field(
        default="1",
        metadata={"help": "Groups of layers that share a sketch's numbers; several."},
    )
    sketch_seeds: int = field(default=3, metadata={"help": "Sketches of each size."})
    dampings: str = field(
        default="10,3,1,0.3,0.1",
        metadata={
            "help": "Dampings of the preconditioned score, in its unit; 1 by default."
        },
    )
    influence_dampings: str = field(
        default="0.3,0.1,0.03,0.01",
        metadata={"help": "Dampings of the influence functions."},
    )
    krylov_dim: int = field(default=40, metadata={"help": "Lanczos steps of it."})
    keep_vectors: int = field(default=20, metadata={"help": "Eigenvectors of it."})
    hessian_rows: int = field(default=1000, metadata={"help": "Rows of its Hessian."})
    snapshots: int = field(
        default=3, metadata={"help": "States of training of TracIn."}
    )
    peers: str = field(
        default="traker,dattri",
        metadata={"help": "Other packages, left out where they are not installed."},
    )
    peer_dampings: str = field(
        default="0,0.1,0.3,1,3,10",
        metadata={
            "help": "Dampings of TRAK, in units of the mean eigenvalue; 0 by default."
        },
    )
    hessian_dampings: str = field(
        default="0.03,0.01,0.003",
        metadata={
            "help": "Dampings of dattri's dense Hessian, of gigabytes; none if empty."
        },
    )


def settled(arguments: LdsArguments) -> LdsArguments:
    """With the defaults of the task.

    Raises:
        ValueError: the task is unknown.
    """
    return of_task(arguments, _TINY, _SETTINGS)


def of_task(
    arguments: Any, tiny: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]
) -> Any:
    """Return `TaskArguments` with the defaults of their task.

    Args:
        arguments: arguments as they were passed.
        tiny: defaults of a check.
        settings: defaults by the name of each known task.

    Raises:
        ValueError: the task is unknown.
    """
    if arguments.task not in settings:
        raise ValueError(
            f"task must be one of {', '.join(settings)}, got {arguments.task!r}: pass "
            "--task digits."
        )
    return with_small(arguments, tiny if arguments.tiny else settings[arguments.task])
