"""Rows of models in shards (FSDP2), no Trainer: scenarios of tests/processes."""

from collections import Counter
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from accelerate.state import PartialState
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from transformers.utils import ModelOutput

from hf_sketch import ExampleSketcher, ModelSketch, sketch_dataset
from hf_sketch.recipes.tables.gpu.fused_head import leave_out_logits
from tests.helpers.processes.joint_trainers import SIZE, leave
from tests.helpers.trained.tiny_models import NAMES, tiny_inputs, tiny_model
from tests.helpers.trained.training import tiny_dataset


def sharded(model, mesh=None):
    """Every layer, then the rest, as FSDP2 is meant to be used."""
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def layers_of(module):
    """The members of the outermost lists of modules."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else layers_of(child)


def in_many_units(model):
    """Each module with parameters that no other has, then the rest."""
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        own = list(module.parameters())
        alone = not any(module.children()) and all(names[id(p)] == 1 for p in own)
        if own and alone:
            fully_shard(module)
    return fully_shard(model)


def with_a_tail(model):
    """The last norm and the head in one unit, as Accelerate has them."""
    tail, embeddings = [model.model.norm, model.lm_head], model.model.embed_tokens
    if embeddings.weight is model.lm_head.weight:
        tail.append(embeddings)
    fully_shard(tail, reshard_after_forward=False)
    return sharded(model)


def families(directory):
    """Rows of models of every kind, each process with a half of the examples."""
    PartialState(cpu=True, backend="gloo")
    for name in NAMES:
        distance, model = distance_in_shards(name, sharded)
        leave(directory, **{name: distance})
    refused_by_sketch_dataset(directory, model)


def units(directory):
    """The same in small units."""
    PartialState(cpu=True, backend="gloo")
    for name in IN_MANY_UNITS:
        distance, _ = distance_in_shards(name, in_many_units)
        leave(directory, **{name: distance})


def fused(directory):
    """The same of models that return their loss alone, of tokens and of rows."""
    PartialState(cpu=True, backend="gloo")
    for tied in (False, True):
        settings = {"tie_word_embeddings": tied}
        for shard in (sharded, with_a_tail):
            distance, _ = distance_in_shards(
                "llama", shard, leave_out_logits, **settings
            )
            leave(directory, **{f"{shard.__name__} {tied}": distance})
    if find_spec("trl") is not None:
        distance, _ = distance_in_shards(
            "llama", in_many_units, fused_by_trl, tie_word_embeddings=False
        )
        leave(directory, unit=distance)
    distance, _ = distance_in_shards("llama", sharded, return_mean_of_rows)
    leave(directory, rows=distance)
    with torch.autocast("cpu", torch.bfloat16):
        distance, _ = distance_in_shards("llama", sharded, return_mean_of_rows)
    leave(directory, autocast=distance)


def fused_by_trl(model):
    """Let TRL compute the loss, which makes the head's weight whole by itself."""
    import_module("trl.trainer.utils").add_fused_lm_head(model)
    model.forward = partial(model.forward, fused_lm_head=True)


def return_mean_of_rows(model):
    """Make a model return the mean of its rows' mean losses, and nothing else."""
    forward = model.forward

    def mean_of_rows(input_ids, labels, attention_mask=None):
        scores = forward(input_ids, attention_mask).logits[:, :-1].mT
        losses = functional.cross_entropy(scores, labels[:, 1:], reduction="none")
        counted = (labels[:, 1:] != -100).sum(1)
        return ModelOutput(loss=(losses.sum(1) / counted).mean())

    model.forward = mean_of_rows


def distance_in_shards(name, shard, change=lambda model: None, **settings):
    """Of rows from those of whole parameters; and the model in shards."""
    rank = PartialState().process_index
    inputs = {n: x[2 * rank :][:2] for n, x in tiny_inputs(name).items()}
    model = tiny_model(name, use_cache=False, **settings)
    change(model)
    wanted = rows_of(model, inputs)
    got = rows_of(shard(model), inputs)
    each = (got - wanted).norm(dim=1) / wanted.norm(dim=1)
    return float(each.max()), model


def refused_by_sketch_dataset(directory, model):
    sketch = ModelSketch.from_model(model, SIZE)
    try:
        sketch_dataset(model, tiny_dataset(2), sketch)
    except ValueError as error:
        leave(directory, dataset=str(error))


def rows_of(model, inputs):
    """The rows of a batch."""
    sketch = ModelSketch.from_model(model, SIZE, "grouped")
    with ExampleSketcher(model, sketch) as sketcher:
        model(**inputs).loss.backward()
        assert sketcher.unverified is None
        return sketcher.take().rows


IN_MANY_UNITS = ("gpt2", "llama", "gemma", "mixtral", "bert", "bart", "t5", "vit")
SCENARIOS = {
    f"fsdp/{scenario.__name__}": scenario for scenario in (families, fused, units)
}
