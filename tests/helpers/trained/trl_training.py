"""TRL's trainers on a tiny model and numbered texts, whose weights stay as they are."""

import importlib
import importlib.util
import re

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainerCallback,
)

from hf_sketch.recipes.texts.minilm import embedded_model_path
from tests.helpers.own_gradients import RESTING

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="needs the package trl"
)

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "to", "her"]
_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }} .{% endgeneration %}{% else %}{{ m['content'] }} ."
    "{% endif %}{% endfor %}"
)


def sentence(index, shift=0):
    """A few words that differ by index."""
    count = 4 + index % 4
    return " ".join(
        WORDS[(5 * index + 3 * k + shift) % len(WORDS)] for k in range(count)
    )


def numbered(rows=6, **columns):
    """A dataset of functions of the row number; the texts of a row start with it."""
    return Dataset.from_list(
        [{name: column(i) for name, column in columns.items()} for i in range(rows)]
    )


def prompt(i):
    return f"{i} {sentence(i)}"


def answer(i):
    return f" {sentence(i, 2)}"


def worse_answer(i):
    return f" {sentence(i, 7)}"


def texts(rows=6):
    return numbered(rows, text=prompt)


def completions():
    return numbered(prompt=prompt, completion=answer)


def chats():
    def messages(i):
        turns = [("user", prompt(i)), ("assistant", answer(i)), ("user", sentence(i))]
        turns.append(("assistant", worse_answer(i)))
        return [{"role": role, "content": content} for role, content in turns]

    return numbered(messages=messages)


def pairs():
    return numbered(prompt=prompt, chosen=answer, rejected=worse_answer)


def ranked_texts():
    def both(tail):
        return lambda i: prompt(i) + tail(i)

    columns = {"chosen": both(answer), "rejected": both(worse_answer)}
    return numbered(**columns, margin=lambda i: 0.1 * i)


def judged_answers():
    return numbered(prompt=prompt, completion=answer, label=lambda i: bool(i % 2))


def prompts():
    return numbered(8, prompt=prompt)


def number_of(text):
    """The row number at the start of a text; None where there is none."""
    found = re.search(r"\d+", text)
    return None if found is None else int(found.group())


def tokenizer():
    loaded = AutoTokenizer.from_pretrained(embedded_model_path())
    loaded.eos_token = loaded.sep_token
    loaded.chat_template = _TEMPLATE
    loaded.model_input_names = ["input_ids", "attention_mask"]
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


def reward_model():
    return tiny_llama(LlamaForSequenceClassification, num_labels=1)


def trl_class(name):
    """A class of TRL, also where it is an experimental one."""
    places = ["trl", *(f"trl.experimental.{x}" for x in ("kto", "orpo", "cpo"))]
    for place in places:
        try:
            return getattr(importlib.import_module(place), name)
        except (ImportError, AttributeError):
            continue
    pytest.skip(f"this TRL has no {name}")


def trl_trainer(
    directory, name, dataset, callback=None, model=None, more=None, **settings
):
    """A Trainer of TRL that leaves the weights as they are.

    A callback is passed on, and `more` are arguments of the Trainer.
    """
    arguments = {
        "output_dir": str(directory),
        **RESTING,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 3,
        **settings,
    }
    config = trl_class(f"{name}Config")
    for unknown in arguments.keys() - config.__dataclass_fields__.keys():
        pytest.skip(f"this TRL has no {unknown}")
    return trl_class(f"{name}Trainer")(
        tiny_llama() if model is None else model,
        args=config(**arguments),
        train_dataset=dataset,
        processing_class=tokenizer(),
        callbacks=[callback or TrainerCallback()],
        **(more or {}),
    )


def generating_trainer(directory, name, callback=None, dataset=None, **settings):
    """A Trainer that generates two answers to each prompt, and judges them."""
    more = {"reward_funcs": length_reward, **settings.pop("more", {})}
    model = tiny_llama()
    model.save_pretrained(directory / "model")  # the reference model is loaded
    tokenizer().save_pretrained(directory / "model")
    return trl_trainer(
        directory,
        name,
        prompts() if dataset is None else dataset,
        callback,
        LlamaForCausalLM.from_pretrained(directory / "model"),
        more,
        **{
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_completion_length": 4,
            **settings,
        },
    )


def length_reward(completions, **_):
    return [float(len(str(x)) % 7) for x in completions]
