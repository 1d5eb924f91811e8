"""Rows beside backward passes of each example alone."""

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_sketch import ExampleSketcher, ModelSketch, load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.examples.calls import field_of

SIZE = 256


RESTING = {  # batches of three, which leave the weights as they are
    "per_device_train_batch_size": 3,
    "num_train_epochs": 1,
    "learning_rate": 0.0,
    "max_grad_norm": 0.0,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


def resting_trainer(directory, model, examples, collator=None, **arguments):
    """A Trainer that records the examples in their order."""
    settings = {
        **RESTING,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
    }
    if collator is None:
        examples = Dataset.from_list(examples)
    return Trainer(
        model,
        TrainingArguments(str(directory), **{**settings, **arguments}),
        train_dataset=examples,
        data_collator=collator,
        callbacks=[GradientSketchCallback(SIZE)],
    )


def assert_rows_are_own(trainer, without=(), tolerance=1e-4):
    """Each row is the sketch of its example's gradient, alone in a batch.

    Rows of the examples `without` labels are zero. The weighted sums of rows are the
    steps' gradients.
    """
    store = load_sketches(trainer.args.output_dir)
    rows = store.dataset.with_format("torch")[:]
    assert sorted(rows["example_id"].tolist()) == [*range(len(trainer.train_dataset))]
    assert rows["finite"].all()
    for row in store.dataset:
        got = torch.tensor(row["sketch"])
        if row["example_id"] in without:
            assert not got.any()
            assert row["weight"] == 0
            continue
        expected, loss = own(trainer, row["example_id"], store.model_sketch)
        assert (got - expected).norm() < tolerance * expected.norm()
        assert row["weight"] > 0
        if row["loss"] == row["loss"]:
            assert abs(row["loss"] - loss) < tolerance * loss
    for step in store.steps.with_format("torch"):
        chosen = rows["step"] == step["step"]
        total = rows["weight"][chosen].float() @ rows["sketch"][chosen]
        assert (total - step["sketch"]).norm() <= 1e-4 * step["sketch"].norm()
    return store


def own(trainer, index, sketch):
    """The sketch of the gradient of one example's loss, and the loss."""
    model = trainer.model
    model.train()
    model.zero_grad()
    batch = trainer.data_collator([trainer.train_dataset[index]])
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    gradient = sketch.sketch(named)
    model.zero_grad()
    return gradient, float(loss.detach())


def own_row(model, batch, sketch, index):
    """The sketch of one example's gradient, from a backward pass of its own."""
    model.zero_grad()
    alone = {name: column[index : index + 1] for name, column in batch.items()}
    loss = field_of(model(**alone), "loss", 0)
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return sketch.sketch(gradients), float(loss.detach())


def assert_rows_match(model, batch, layout, tolerance):
    size = min(256, sum(p.numel() for p in model.parameters()))
    sketch = ModelSketch.from_model(model, size, layout)
    with ExampleSketcher(model, sketch) as sketcher:
        got = sketcher.sketch(batch)
    for index in range(len(batch["labels"])):
        row, loss = own_row(model, batch, sketch, index)
        assert (got.rows[index] - row).norm() < tolerance * row.norm()
        assert abs(float(got.losses[index]) - loss) < tolerance
    return got
