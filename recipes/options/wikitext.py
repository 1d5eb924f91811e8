"""Options of `hf-sketch wikitext`."""

from dataclasses import dataclass, field


@dataclass
class WikitextArguments:
    """Fine-tune a causal language model and find the passages behind its losses.

    An example is a passage of at least `min_words` words. Held-out passages are the
    queries.
    """

    model_name_or_path: str = field(
        default="distilbert/distilgpt2",
        metadata={"help": "Any causal language model; the default is the paper's."},
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": ".txt with one passage per line, or .json, .jsonl or .csv with a "
            "column text, optionally with .gz; by default WikiText-2 from the Hub."
        },
    )
    query_file: str | None = field(
        default=None,
        metadata={"help": "Passages to explain; by default the Hub's validation rows."},
    )
    num_queries: int = field(
        default=10, metadata={"help": "Number of passages to explain."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Passages to train on; all by default."}
    )
    min_words: int = field(
        default=20, metadata={"help": "Drop passages with fewer words, as headings."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens kept per passage."})
    out_size: int = field(default=4096, metadata={"help": "Numbers per sketch."})
    method: str = field(
        default="tracin",
        metadata={"help": "Method of scoring, see hf-sketch attribute."},
    )
    damping: float | None = field(
        default=None, metadata={"help": "Damping of preconditioned."}
    )
    token_scores: bool = field(
        default=False,
        metadata={"help": "Split scores over tokens; as in hf-sketch attribute."},
    )
    top_k: int = field(default=5, metadata={"help": "Proponents per query."})
    bottom_k: int = field(default=5, metadata={"help": "Opponents per query."})


WIKITEXT_TRAINING = {
    "output_dir": "out/wikitext",
    "num_train_epochs": 3.0,
    "learning_rate": 5e-5,
    "save_strategy": "epoch",
}
