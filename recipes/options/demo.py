"""Options of `hf-sketch demo`."""

from dataclasses import dataclass, field


@dataclass
class DemoArguments:
    """Fine-tune MiniLM on SNLI with a tenth of the labels flipped, and attribute."""

    output_dir: str = field(
        default="out/demo", metadata={"help": "Folder for checkpoints and sketches."}
    )
    out_size: int = field(default=4096, metadata={"help": "Numbers per sketch."})
    num_train_epochs: int = field(default=3, metadata={"help": "Training epochs."})
    num_queries: int = field(
        default=3, metadata={"help": "Number of validation examples to explain."}
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of training, flipped labels and sketch."}
    )
    tiny: bool = field(
        default=False, metadata={"help": "Run a few rows for one epoch, as a check."}
    )
