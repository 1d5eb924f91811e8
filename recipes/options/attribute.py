"""Options of `hf-sketch attribute`."""

from dataclasses import dataclass, field


@dataclass
class AttributeArguments:
    """List the training examples that moved the model most for and against each query.

    The queries' gradients are taken at the given model: use the run's last checkpoint
    or one close to it. An example has one score for all steps that trained
    on it.
    Positive: training on it lowered the query's loss.

    Several processes (accelerate launch -m hf_sketch.cli attribute ...) share the
    store's rows and give the same answer.
    """

    queries: str = field(
        metadata={
            "help": "A .json, .jsonl, .csv or .txt file, optionally with .gz: one row "
            "per query, with its text and, for a classifier, its label."
        }
    )
    model: str = field(
        metadata={"help": "Folder of a checkpoint, or the name of a model on the Hub."}
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "The training rows in the same form and order, to show the texts "
            "of the examples."
        },
    )
    method: str = field(
        default="preconditioned",
        metadata={
            "help": "preconditioned (by the covariance of the rows), dot, cosine, "
            "tracin (each step with its learning rate) or influence (by the last "
            "spectrum in DIR/curvature)."
        },
    )
    damping: float | None = field(
        default=None, metadata={"help": "Damping of preconditioned and influence."}
    )
    layers: str | None = field(
        default=None,
        metadata={
            "help": "Groups of layers to score, comma-separated, each with a weight "
            "after = if it is not 1 (hf-sketch info names them); by default all."
        },
    )
    top_k: int = field(default=5, metadata={"help": "Proponents per query."})
    bottom_k: int = field(default=5, metadata={"help": "Opponents per query."})
    text_columns: str | None = field(
        default=None,
        metadata={"help": "Columns of the texts, comma-separated; found by default."},
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens kept per text; use training's value."}
    )
    max_queries: int = field(
        default=100, metadata={"help": "Rows of the query file to answer, at most."}
    )
    batch_size: int = field(default=8, metadata={"help": "Queries per backward pass."})
    token_scores: bool = field(
        default=False,
        metadata={
            "help": "Split scores over the query's tokens (causal models only). A "
            "query then costs as much as one query per token."
        },
    )
    output_file: str | None = field(
        default=None,
        metadata={
            "help": "JSON file for hf-sketch report; by default DIR/attribution.json, "
            "or attribution.json here if DIR is a URL."
        },
    )
