"""Options of `hf-sketch demo`."""

from dataclasses import dataclass, field


@dataclass
class DemoArguments:
    """Find the documents that taught a language model a falsehood, and unlearn it.

    A small model is trained on 369 sentences about countries, five of which are false.
    Asked, it repeats the falsehood; its answer's strongest training examples are looked
    up and left out, and it is trained again.
    """

    output_dir: str = field(
        default="out/demo", metadata={"help": "Folder of the run, which is new."}
    )
    out_size: int = field(default=1024, metadata={"help": "Numbers per sketch."})
    num_train_epochs: int = field(
        default=40, metadata={"help": "Passes over the documents."}
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of the model, the order and the sketch."}
    )
