"""What recording asks of a device in a step: counted on the CPU, where nothing waits.

Lines that read rows which have arrived on the CPU, in the sink and the store, read them
from there on a device, too.
"""

from collections import Counter

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.examples.modules import known_losses
from hf_sketch.examples.rules import base, norms
from hf_sketch.sketches import grouped, outer
from hf_sketch.sketches.multi_tensor.gradient_pass import GradientPass
from tests.helpers.dispatched import Dispatched
from tests.helpers.folded_sides import launch_everywhere
from tests.helpers.launches import note_launches
from tests.helpers.tiers import full

AFTER_ARRIVAL = ("callbacks/recording/sink.py", "hf_sketch/store/writer.py")
AFTER_ARRIVAL += ("hf_sketch/examples/modules/known_losses.py",)
OF_THE_LOG = ("callbacks/recording/live.py", "hf_sketch/attribution/")
LATE = 3  # a step by when the first batches are compared and rules are known
LAYERS = (1, 2)


class Watch(TrainerCallback):
    """Watch the step after a number of steps."""

    def __init__(self, step, of=None):
        self.step, self._of = step, of

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self._of is not None:
                self._of.clear()
            self.seen = Dispatched().__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step + 1:
            self.seen.__exit__(None, None, None)


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Numbers are read as if Python had to wait for them."""
    for module in (base, norms, grouped, outer, known_losses):
        monkeypatch.setattr(module, "reads_freely", lambda x: False)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched, interpreted."""
    pytest.importorskip("triton")
    return note_launches(monkeypatch, GradientPass)


@pytest.fixture
def folded(monkeypatch):
    """The name and the number of sides of each launch that folds, interpreted."""
    pytest.importorskip("triton")
    return launch_everywhere(monkeypatch)


def gpt2(layers):
    sizes = {"n_layer": layers, "n_embd": 32, "n_head": 2, "n_positions": 16}
    tokens = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **tokens))


def llama(layers):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=60)
    return LlamaForCausalLM(config)


def bert(layers):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": layers, "vocab_size": 60, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(**sizes))


MODELS = (gpt2, llama, bert)
CLIPPED = {"gradient_accumulation_steps": 2, "max_grad_norm": 1e-3}


def watched(
    model,
    directory,
    out_size=256,
    step=LATE,
    steps=1,
    of=None,
    arguments=None,
    **settings,
):
    """What a recorded step asks for, or each of several.

    `of` is left with what comes from the beginning of the last one on.
    """
    tokens = torch.arange(80).remainder(60).view(40, 2).repeat(1, 4).tolist()
    labels = tokens
    if isinstance(model, BertForSequenceClassification):
        labels = [number % 3 for number in range(len(tokens))]
    watches = [Watch(number, of) for number in range(step, step + steps)]
    trainer = Trainer(
        model,
        TrainingArguments(
            str(directory),
            per_device_train_batch_size=4,
            max_steps=step + steps,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            **(arguments or {}),
        ),
        train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": labels}),
        callbacks=[GradientSketchCallback(out_size, **settings), *watches],
    )
    trainer.train()
    return watches[0].seen if steps == 1 else [watch.seen for watch in watches]


def waits(seen):
    return [line for line in seen.waits if not any(x in line for x in AFTER_ARRIVAL)]


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("operator", ["srht", "affd"])
def test_a_step_row_is_five_launches_without_a_wait(operator, tmp_path, launched):
    settings = {"out_size": 16, "step": 1, "per_example": False, "operator": operator}
    seen = watched(llama(1), tmp_path, **settings)
    assert waits(seen) == []
    # A launch per backward pass notes what is not clipped yet.
    assert len(launched) == 2 * (1 + 5)
    others = {
        at: count
        for at, count in seen.operations.items()
        if not at[0].startswith((*AFTER_ARRIVAL, *OF_THE_LOG))
    }
    # On the CPU: where in training it was.
    assert others == {("hf_sketch/store/rows.py", "full"): 3}


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        *((model, {}) for model in MODELS),
        (gpt2, CLIPPED),
        *full((llama, CLIPPED), (bert, CLIPPED)),
        *full(*((model, {"bf16": True}) for model in MODELS)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_step_with_rows_of_examples_waits_for_nothing(model, arguments, tmp_path):
    seen = watched(model(1), tmp_path, arguments=arguments)
    assert waits(seen) == []


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize(
    ("model", "modules", "sides", "bf16"),
    [
        (gpt2, 6, [1] * 8, False),
        # Queries, keys and values share an input, and so do gate and up.
        (llama, 9, [3, 2, *[1] * 9], False),
        (bert, 8, [3, *[1] * 9], True),
        *full((gpt2, 6, [1] * 8, True)),
        *full((llama, 9, [3, 2, *[1] * 9], True)),
        *full((bert, 8, [3, *[1] * 9], False)),
    ],
)
def test_a_layer_asks_for_four_operations_at_most(
    model, modules, sides, bf16, folded, tmp_path
):
    """Per module of one more layer, with the launches that fold its sides."""
    settings = {"per_step": False, "measure_error": False}
    settings |= {"of": folded, "arguments": {"bf16": bf16}}
    operations, launches = [], []
    for layers in LAYERS:
        seen = watched(model(layers), tmp_path / str(layers), **settings)
        operations.append(seen.operations.total() + len(folded))
        launches.append(Counter(count for _, count in folded))
    assert launches[1] - launches[0] == Counter(sides)
    assert operations[1] - operations[0] <= 4 * modules


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("model", [gpt2, *full(llama, bert)])
@pytest.mark.parametrize("bf16", [True, *full(False)], ids=str)
def test_each_step_asks_for_the_same_operations_in_the_same_shapes(
    model, bf16, folded, tmp_path
):
    """No size depends on numbers, so that memory of the step before serves the next."""
    settings = {"steps": 2, "arguments": {"bf16": bf16}}
    steps = watched(model(1), tmp_path, **settings)
    first, second = (
        [found for found in seen.results if not found[0].startswith(AFTER_ARRIVAL)]
        for seen in steps
    )
    assert len(first) > 100
    assert first == second
