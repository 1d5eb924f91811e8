"""Options of `hf-sketch audit`."""

from dataclasses import dataclass, field


@dataclass
class AuditArguments:
    """Find the training examples of a run that may be mislabeled or are duplicates.

    Suspicion is the mean of an example's excess loss and of its disagreement with the
    others, both in standard deviations: see docs/audit.md. Nothing is trained and no
    model is loaded.
    """

    train_file: str = field(
        metadata={
            "help": "The run's training file (.json, .jsonl, .csv or .txt, optionally "
            "with .gz), with its rows in the same order."
        }
    )
    text_columns: str | None = field(
        default=None,
        metadata={
            "help": "Columns to show, comma-separated; by default all text columns."
        },
    )
    threshold: float | None = field(
        default=None,
        metadata={
            "help": "Smallest cosine of duplicates, in (0, 1]; by default derived from "
            "the store."
        },
    )
    top_k: int = field(
        default=10,
        metadata={"help": "Examples and pairs printed; audit.jsonl has all examples."},
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for audit.jsonl; by default DIR, or the working directory "
            "if DIR is a URL."
        },
    )
    drop: str | None = field(
        default=None,
        metadata={
            "help": "Share (2%%) or number (50) of the most suspicious examples that "
            "output_file leaves out."
        },
    )
    output_file: str | None = field(
        default=None,
        metadata={"help": "New .jsonl file for the training rows that are left."},
    )
