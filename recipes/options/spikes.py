"""Options of `hf-sketch spikes`."""

from dataclasses import dataclass, field


@dataclass
class SpikesArguments:
    """List steps whose loss or gradient norm stands out, and the examples behind them.

    A step stands out if its value lies more than `threshold` robust standard deviations
    above the median of the recorded steps before it. An example's share is the part of
    the step's gradient that it contributed. Shares add up to 100%, and an example that
    pulled the other way has a negative share.
    """

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "The run's training file (.json, .jsonl, .csv or .txt), with its "
            "rows in the same order, to show the texts of the examples."
        },
    )
    text_columns: str | None = field(
        default=None,
        metadata={
            "help": "Columns to show, comma-separated; by default all text columns."
        },
    )
    threshold: float = field(
        default=8.0, metadata={"help": "Robust standard deviations above the median."}
    )
    window: int = field(
        default=50, metadata={"help": "Recorded steps that a step is compared with."}
    )
    carried: float = field(
        default=0.95,
        metadata={"help": "Part of a step's gradient that the named examples carry."},
    )
    top_k: int = field(
        default=5,
        metadata={"help": "Examples printed per step; output_file has all named ones."},
    )
    output_file: str | None = field(
        default=None,
        metadata={
            "help": "Quarantine list: a JSON lines file of the named examples, each "
            "with its id, its steps and its row of the training file."
        },
    )
