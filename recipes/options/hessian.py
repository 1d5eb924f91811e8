"""Options of `hf-sketch hessian`."""

from dataclasses import dataclass, field
from typing import Literal

from hf_sketch.recipes.options.dimension import SMALL, TRAIN_FILE


@dataclass
class HessianArguments:
    """Record Hessian spectra while a model is fine-tuned.

    Defaults follow Schioppa (2024). The paper does not state: batches per product,
    number of training steps, sequence lengths.
    """

    task: Literal["snli", "xsum"] = field(
        default="snli", metadata={"help": "Task that the model is trained on."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Model; roberta-base for snli and bart-base for xsum by default."
        },
    )
    train_file: str | None = field(default=None, metadata=TRAIN_FILE)
    small: bool = field(default=False, metadata=SMALL)
    steps: str = field(
        default="0,10,50,100,150,200,250,500",
        metadata={"help": "Steps to compute a spectrum after; 0 is the start."},
    )
    every: int = field(
        default=1000,
        metadata={"help": "Also compute a spectrum every `every` steps; 0 disables."},
    )
    batches: int = field(
        default=4, metadata={"help": "Batches the Hessian's loss is averaged over."}
    )
    krylov_dim: int = field(
        default=1000, metadata={"help": "Lanczos steps (products) per spectrum."}
    )
    out_size: int = field(default=2**20, metadata={"help": "Numbers per sketch."})
    keep_vectors: int = field(
        default=50,
        metadata={"help": "Eigenvectors to keep, of the largest eigenvalues."},
    )
    operator: str = field(
        default="affd", metadata={"help": "Operator of the sketch, by name."}
    )
    layout: str = field(default="blocked", metadata={"help": "blocked or flat."})
    mode: str = field(
        default="auto", metadata={"help": "auto, autograd or finite_difference."}
    )
    max_source_length: int = field(
        default=512, metadata={"help": "Tokens kept per document."}
    )
    max_target_length: int = field(
        default=64, metadata={"help": "Tokens kept per summary."}
    )


HESSIAN_TRAINING = {
    "output_dir": "out/hessian",
    "optim": "sgd",
    "learning_rate": 1e-5,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 32,
    "max_steps": 10_000,
    "save_total_limit": 1,
}
