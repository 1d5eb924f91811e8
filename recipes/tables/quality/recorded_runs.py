"""Short training runs from the same weights on the same batches, with recorders."""

import gc
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_sketch.recipes.placement import device, synchronize
from hf_sketch.recipes.tables.recorders import (
    PostHocRecorder,
    Recorder,
    TrainingRecorder,
    intervals,
)


@dataclass(frozen=True)
class Shape:
    """A model and its batches.

    Args:
        model_type: as Transformers has it.
        config: what differs from the type's default configuration.
        batch_size: examples in a batch.
        tokens: tokens per example.
        bf16: whether training is in mixed precision.
    """

    model_type: str
    config: dict[str, Any]
    batch_size: int
    tokens: int
    bf16: bool = False

    @property
    def tiny(self) -> "Shape":
        """Of the same type, for a check."""
        config = {**self.config, **_TINY}
        return replace(self, config=config, batch_size=8, tokens=16)


_NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
_LLAMA = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
_LLAMA |= {"num_attention_heads": 4, "vocab_size": 1024, "tie_word_embeddings": True}
_LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
_LLAMA_1B |= {"num_attention_heads": 32, "num_key_value_heads": 8}
_LLAMA_1B |= {"vocab_size": 128256, "tie_word_embeddings": True}
SHAPES = {
    "gpt2-small": Shape("gpt2", _NO_DROPOUT, 8, 128),
    "gpt2-small-bf16": Shape("gpt2", _NO_DROPOUT, 32, 512, bf16=True),
    "gpt2-small-1024": Shape("gpt2", _NO_DROPOUT, 8, 1024, bf16=True),
    "tiny-llama": Shape("llama", _LLAMA, 16, 64),
    "llama-1b": Shape("llama", _LLAMA_1B, 4, 1024, bf16=True),
}
_TINY = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2}
_TINY |= {"num_key_value_heads": 2, "intermediate_size": 128}
_TINY |= {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
_ELEMENTS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Setting:
    """A model and data that every run starts from.

    Args:
        model: trained in place.
        weights: its initial state.
        data: examples, read in order.
        batch_size: examples in a batch.
        bf16: whether training is in mixed precision.
    """

    model: nn.Module
    weights: dict[str, Tensor]
    data: Dataset
    batch_size: int
    bf16: bool = False

    @classmethod
    def of_shape(cls, shape: Shape, batches: int) -> "Setting":
        """Random weights without dropout, and random text."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(shape.model_type, **shape.config)
        model = AutoModelForCausalLM.from_config(config).to(device())
        weights = {name: x.clone() for name, x in model.state_dict().items()}
        examples = batches * shape.batch_size
        ids = random_text(config.vocab_size, examples, shape.tokens).tolist()
        data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        return cls(model, weights, data, shape.batch_size, shape.bf16)

    def restore(self) -> None:
        """Give the model its initial weights back, and free what earlier runs held."""
        self.model.load_state_dict(self.weights)
        self.model.zero_grad()
        gc.collect()

    def loader(self, batches: int) -> DataLoader[Any]:
        """The first batches."""
        data: Any = self.data.select(range(batches * self.batch_size))
        return DataLoader(data, self.batch_size, collate_fn=default_data_collator)


class StepEnds(TrainerCallback):
    """The times at which steps end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize()
        self.times.append(time.perf_counter())


def random_text(vocabulary: int, examples: int, tokens: int) -> Tensor:
    """Random tokens by Zipf's law, in half of the cases in the order of a topic's own.

    With equally frequent tokens gradients would be all but orthogonal, and their inner
    products too much alike to tell good sketches from bad ones.

    Shapes:
        returns (examples, tokens)
    """
    zipf = 1 / torch.arange(1, vocabulary + 1)
    topics = [zipf + zipf[torch.randperm(vocabulary)] for _ in range(2)]
    rows = [torch.multinomial(topics[i % 2], tokens, True) for i in range(examples)]
    return torch.stack(rows)


def train(
    setting: Setting, recorder: Recorder | None, directory: Path, steps: int
) -> list[float]:
    """Train with AdamW; the seconds of each step after the first."""
    trainer = Trainer(
        setting.model,
        TrainingArguments(
            str(directory),
            per_device_train_batch_size=setting.batch_size,
            num_train_epochs=1,
            learning_rate=1e-5,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=device().type == "cpu",
            bf16=setting.bf16,
            dataloader_pin_memory=False,
        ),
        train_dataset=setting.loader(steps).dataset,
        data_collator=default_data_collator,
    )
    trainer.remove_callback(PrinterCallback)
    if isinstance(recorder, TrainingRecorder):
        recorder.attach(trainer)
    ends = StepEnds()
    trainer.add_callback(ends)
    trainer.train()
    return intervals(ends.times)


def record(
    setting: Setting, recorder: Recorder | None, directory: Path, steps: int
) -> list[float]:
    """Train, or collect after training; the seconds of each step or batch but one."""
    if isinstance(recorder, PostHocRecorder):
        return recorder.collect(setting.model, setting.loader(steps), directory)
    return train(setting, recorder, directory, steps)


def exact_products(setting: Setting) -> dict[str, Tensor]:
    """Inner products of the gradients of the first batch's examples, each by itself.

    Shapes:
        returns name of a trainable parameter -> (b, b), float64
    """
    setting.restore()
    model = setting.model.eval()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    (batch,) = setting.loader(1)
    gradients: list[tuple[Tensor, ...]] = []
    for index in range(setting.batch_size):
        alone = {
            name: x[index : index + 1].to(model.device) for name, x in batch.items()
        }
        gradients.append(torch.autograd.grad(model(**alone).loss, [*named.values()]))
    products: dict[str, Tensor] = {}
    for name, parts in zip(named, zip(*gradients, strict=True), strict=True):
        rows = torch.stack([part.flatten() for part in parts])
        pieces = (some.double() for some in rows.split(_ELEMENTS_AT_ONCE, dim=1))
        products[name] = torch.stack([some @ some.T for some in pieces]).sum(0)
    return products
