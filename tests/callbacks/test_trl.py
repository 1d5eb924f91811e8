"""Rows of TRL's trainers: one per example of the dataset, under its own id."""

import importlib.util

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from hf_sketch import load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.recipes.demo import embedded_model_path

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("trl") is None, reason="needs the package trl"
    ),
    pytest.mark.filterwarnings("ignore"),  # TRL's own
]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "to", "her"]
SIZE = 256


def sentence(index, shift=0):
    """A few words that differ by index."""
    count = 4 + index % 4
    return " ".join(
        WORDS[(5 * index + 3 * k + shift) % len(WORDS)] for k in range(count)
    )


def pairs(rows=6):
    """A prompt with a chosen and a rejected answer."""
    return Dataset.from_list(
        [
            {
                "prompt": sentence(i),
                "chosen": " " + sentence(i, 2),
                "rejected": " " + sentence(i, 7),
            }
            for i in range(rows)
        ]
    )


def texts(rows=6):
    return Dataset.from_list([{"text": sentence(i)} for i in range(rows)])


def answers(rows=6):
    return Dataset.from_list(
        [
            {"prompt": sentence(i), "completion": sentence(i, 2), "label": bool(i % 2)}
            for i in range(rows)
        ]
    )


def tokenizer():
    loaded = AutoTokenizer.from_pretrained(embedded_model_path())
    loaded.eos_token = loaded.sep_token
    return loaded


def tiny_llama(kind=LlamaForCausalLM, **config):
    torch.manual_seed(0)
    settings = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 30522,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 101,
        "eos_token_id": 102,
    }
    return kind(LlamaConfig(**{**settings, **config}))


def trl_class(name):
    """A class of TRL, also where it is an experimental one."""
    places = ["trl", *(f"trl.experimental.{x}" for x in ("kto", "orpo", "cpo"))]
    for place in places:
        try:
            return getattr(importlib.import_module(place), name)
        except (ImportError, AttributeError):
            continue
    pytest.skip(f"this TRL has no {name}")


def trl_trainer(directory, name, dataset, callback, model=None, more=None, **settings):
    """A Trainer of TRL that leaves the weights as they are."""
    arguments = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 3,
        "num_train_epochs": 1,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 3,
        **settings,
    }
    return trl_class(f"{name}Trainer")(
        tiny_llama() if model is None else model,
        args=trl_class(f"{name}Config")(**arguments),
        train_dataset=dataset,
        processing_class=tokenizer(),
        callbacks=[callback],
        **(more or {}),
    )


def assert_rows_are_of_their_examples(trainer, items=None):
    """Each row is parallel to the gradient of its example alone."""
    trainer.train()
    store = load_sketches(trainer.args.output_dir)
    assert sorted(store.dataset["example_id"][:]) == [*range(len(items or [*range(6)]))]
    for row in store.dataset:
        model = trainer.model.train()
        model.zero_grad()
        example = trainer.train_dataset[row["example_id"]]
        inputs = trainer._prepare_inputs(trainer.data_collator([example]))
        trainer.compute_loss(model, inputs).backward()
        gradients = {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        expected = store.model_sketch.sketch(gradients).float()
        cosine = torch.cosine_similarity(torch.tensor(row["sketch"]), expected, dim=0)
        assert cosine > 0.999
    return store


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        pytest.param(
            {"padding_free": True, "max_length": None}, marks=pytest.mark.full
        ),
        pytest.param({"loss_type": "dft"}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_fine_tuning_on_texts_has_a_row_per_text(tmp_path, arguments):
    callback = GradientSketchCallback(SIZE)
    trainer = trl_trainer(tmp_path, "SFT", texts(), callback, **arguments)
    assert_rows_are_of_their_examples(trainer)


def test_a_pair_has_one_row(tmp_path):
    """The chosen answers of a batch come first, then the rejected ones."""
    more = {"ref_model": tiny_llama()}
    callback = GradientSketchCallback(SIZE)
    trainer = trl_trainer(tmp_path, "DPO", pairs(), callback, more=more)
    store = assert_rows_are_of_their_examples(trainer)
    weight = torch.tensor(store.dataset["weight"][:])
    assert torch.allclose(weight, torch.tensor(1 / 3))


@pytest.mark.full
@pytest.mark.parametrize("name", ["Reward", "ORPO", "CPO"])
def test_other_trainers_of_pairs_have_a_row_per_pair(tmp_path, name):
    model, dataset, settings = None, pairs(), {"max_length": 32}
    if name == "Reward":
        model = tiny_llama(LlamaForSequenceClassification, num_labels=1)
        dataset, settings = dataset.remove_columns("prompt"), {}
    callback = GradientSketchCallback(SIZE)
    trainer = trl_trainer(tmp_path, name, dataset, callback, model, **settings)
    trainer.train()
    ids = load_sketches(tmp_path).dataset["example_id"][:]
    assert sorted(ids) == [*range(6)]


@pytest.mark.full
def test_judged_answers_have_a_row_each(tmp_path):
    more = {"ref_model": tiny_llama()}
    callback = GradientSketchCallback(SIZE)
    trl_trainer(tmp_path, "KTO", answers(), callback, more=more).train()
    ids = load_sketches(tmp_path).dataset["example_id"][:]
    assert sorted(ids) == [*range(6)]


@pytest.mark.full
def test_the_rows_of_a_pair_can_be_kept_apart(tmp_path):
    for folder, per_row in (("together", False), ("apart", True)):
        more = {"ref_model": tiny_llama()}
        callback = GradientSketchCallback(SIZE, per_row=per_row)
        trl_trainer(tmp_path / folder, "DPO", pairs(), callback, more=more).train()
    apart = load_sketches(tmp_path / "apart").dataset.with_format("torch")[:]
    together = load_sketches(tmp_path / "together").dataset.with_format("torch")[:]
    for example in range(6):
        rows = apart["example_id"] == example
        assert apart["part"][rows].tolist() == [0, 1]
        weights = apart["weight"][rows].to(torch.float32)
        total = (weights @ apart["sketch"][rows]) / weights.sum()
        own = together["sketch"][together["example_id"] == example]
        torch.testing.assert_close(total.unsqueeze(0), own)


@pytest.mark.full
@pytest.mark.parametrize(
    ("strategy", "per_row"), [("bfd", False), ("bfd", True), ("wrapped", False)]
)
def test_packed_texts_have_a_row_per_packed_example(tmp_path, strategy, per_row):
    callback = GradientSketchCallback(SIZE, per_row=per_row)
    trainer = trl_trainer(
        tmp_path,
        "SFT",
        texts(13),
        callback,
        packing=True,
        packing_strategy=strategy,
        max_length=32 if strategy == "bfd" else 16,
    )
    trainer.train()
    packed, rows = trainer.train_dataset, load_sketches(tmp_path).dataset
    expected = [*range(len(packed))]
    if per_row:
        expected = [i for i in expected for _ in packed[i]["seq_lengths"]]
    assert sorted(rows["example_id"][:]) == expected


@pytest.mark.full
@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("steps_per_generation", [1, 2])
def test_generated_answers_carry_the_id_of_their_prompt(
    tmp_path, conversational, steps_per_generation
):
    """The generated batch is shuffled, and cut into the batches of several steps."""
    prompts = [f"{sentence(i)} {i}" for i in range(8)]
    words = tokenizer()
    words.model_input_names = ["input_ids", "attention_mask"]
    template = "{% for m in messages %}{{ m['content'] }} .{% endfor %}"
    words.chat_template = template
    dataset = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": x}] if conversational else x}
            for x in prompts
        ]
    )
    trainer = trl_class("GRPOTrainer")(
        tiny_llama(),
        args=trl_class("GRPOConfig")(
            str(tmp_path),
            per_device_train_batch_size=4,
            steps_per_generation=steps_per_generation,
            num_train_epochs=1,
            num_generations=2,
            max_completion_length=4,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=dataset,
        processing_class=words,
        reward_funcs=lambda completions, **_: [
            float(len(str(c)) % 7) for c in completions
        ],
        callbacks=[GradientSketchCallback(SIZE)],
    )
    seen = []

    def note(module, args, kwargs):
        if torch.is_grad_enabled() and module.training:
            seen.extend(words.decode(x) for x in kwargs["input_ids"])

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    # Rules are tried on a batch before it is recorded, out of training mode.
    ids = load_sketches(tmp_path).dataset["example_id"][:]
    assert len(ids) == len(seen) > 0
    assert all(prompts[i] in text for i, text in zip(ids, seen, strict=True))
