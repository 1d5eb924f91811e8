"""Options of `hf-sketch select`."""

from dataclasses import dataclass, field


@dataclass
class SelectArguments:
    """Choose the training rows of a pool that best serve a target, as LESS does.

    A short run with LoRA on the pool records each example's gradient in Adam's
    geometry. An example's score is its mean cosine with the gradients of the target's
    examples. With several tasks, the largest score counts.
    """

    model_name_or_path: str = field(metadata={"help": "Any text model to fine-tune."})
    train_file: str = field(
        metadata={"help": "The pool: .json, .jsonl, .csv or .txt, or one with .gz."}
    )
    query_file: str = field(
        metadata={"help": "Examples of the target, in the same format."}
    )
    output_file: str = field(
        metadata={"help": "JSON lines file for the chosen rows, best first."}
    )
    keep: str = field(
        default="5%", metadata={"help": "Rows to choose: a number, or a share (5%%)."}
    )
    sketches: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a run that recorded the pool: choose by its rows and its"
            " last checkpoint instead of training."
        },
    )
    task_column: str = field(
        default="task",
        metadata={"help": "Column of query_file with each row's task, if it has one."},
    )
    over_tasks: str = field(
        default="max",
        metadata={"help": "Score over several tasks: their max, as in LESS, or mean."},
    )
    diversity: float = field(
        default=0.0,
        metadata={
            "help": "Weight in [0, 1) of dissimilarity from the rows already chosen; 0 "
            "ranks by scores alone."
        },
    )
    warmup_share: float = field(
        default=0.05,
        metadata={"help": "Share of the run that only warms up Adam's moments."},
    )
    text_columns: str | None = field(
        default=None, metadata={"help": "Text columns, comma-separated."}
    )
    max_length: int = field(default=256, metadata={"help": "Tokens kept per row."})
    out_size: int = field(default=4096, metadata={"help": "Numbers per sketch."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapters."})
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "Comma-separated methods to compare with: random, bm25, rds "
            "(cosine of mean hidden states). Every second row of query_file is then "
            "held out, and a fresh adapter is trained on each choice."
        },
    )
    compare_epochs: float = field(
        default=3.0, metadata={"help": "Training epochs on each compared choice."}
    )


SELECT_TRAINING = {
    "output_dir": "out/select",
    "num_train_epochs": 1.0,
    "learning_rate": 2e-4,
    "save_strategy": "epoch",
}
