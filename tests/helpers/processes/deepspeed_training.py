"""Training by DeepSpeed, and the same without it, in several processes."""

from functools import partial

from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.processes.distributed_training import SIZE, even, train

STAGES = (1, 2)
SETTINGS = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}


def in_stage(stage, watched, directory):
    """Steps of two micro-batches, clipped, while the learning rate falls."""
    settings = {**SETTINGS, "zero_optimization": {"stage": stage}}
    callbacks = [GradientSketchCallback(SIZE)] if watched else []
    training = {"optim": "sgd", "learning_rate": 1e-2}
    train(directory, *callbacks, **even(), **training, deepspeed=settings)


def without(directory):
    """The same by DDP."""
    training = {"optim": "sgd", "learning_rate": 1e-2}
    train(directory, GradientSketchCallback(SIZE), **even(), **training)


SCENARIOS = {
    "deepspeed/without": without,
    **{f"deepspeed/{stage}": partial(in_stage, stage, True) for stage in (0, 1, 2, 3)},
    **{f"deepspeed/plain-{n}": partial(in_stage, n, False) for n in STAGES},
}
