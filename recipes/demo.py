"""A first minute: which documents taught a language model what it says?"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from huggingface_hub import ModelCardData
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_sketch import GradientRows, load_sketches, sketch_dataset
from hf_sketch.attribution.record import FILE, record_attribution
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.model.state import evaluation_mode
from hf_sketch.recipes.options.demo import DemoArguments
from hf_sketch.recipes.saved_report import save_card
from hf_sketch.recipes.texts.country_facts import (
    QUESTION,
    country_documents,
    word_tokenizer,
)
from hf_sketch.report.page import write_report

_IGNORED = -100  # a label that has no loss
_CARD = """
# The model of hf-sketch demo

A GPT-2 with two layers, trained from scratch for {epochs} epochs on {documents}
sentences about countries. **{planted} of them are false, on purpose.** Asked
"{question}", the model says {answers}.

It shows how to trace a wrong answer to its training texts. Do not use it as a source
of facts. The sketches of its training's gradients are in the folder `sketches` beside
it.
"""


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Args:
        before: the model's answers and their probabilities, the likeliest first.
        named: false documents among the documents ranked first, `planted` of them.
        planted: false documents.
        after: as `before`, of the model that was trained without those named.
    """

    before: list[tuple[str, float]]
    named: int
    planted: int
    after: list[tuple[str, float]]


def run_demo(arguments: DemoArguments) -> DemoResult:
    """Train, ask, name the documents, train without them, and ask again.

    Raises:
        ValueError: the output directory already holds sketches.
    """
    logging.set_verbosity_error()
    disable_progress_bars()
    documents = country_documents(arguments.seed)
    planted = sum(documents["false"])
    tokenizer = word_tokenizer(documents["text"][:])
    print(
        "hf_sketch shows which training examples made a model say what it says.\n"
        f"Here a small language model learns {len(documents)} sentences about countries"
        f", {planted} of which are false.\n"
    )
    print("Training; a sketch of every example's gradient is written meanwhile.")
    callback = GradientSketchCallback(out_size=arguments.out_size)
    model = _trained(documents, tokenizer, arguments, "", [callback])
    before = _answers(model, tokenizer)
    print(f'\nAsked "{QUESTION}", the model says {_spoken(before)}.')

    store = load_sketches(arguments.output_dir)
    queries = _query(store, model, tokenizer, before[0][0])
    top = store.attribute(queries, top_k=planted, dataset=documents).to_list()
    named = [line["example_id"] for line in top]
    found = sum(documents[number]["false"] for number in named)
    print("\nThe sentences behind this answer, strongest first:")
    for rank, line in enumerate(top, 1):
        print(f"  {rank}. {line['text']}")
    print(f"{found} of the {planted} false sentences are among these {len(named)}.")

    print("\nTraining again without them.")
    kept = [number for number in range(len(documents)) if number not in named]
    other = _trained(documents.select(kept), tokenizer, arguments, "without", [])
    after = _answers(other, tokenizer)
    print(f'\nAsked "{QUESTION}", the new model says {_spoken(after)}.')
    _save_model(arguments, documents, model, tokenizer, before)
    _save(arguments, documents, store, queries, before[0][0])
    return DemoResult(before, found, planted, after)


def _trained(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    arguments: DemoArguments,
    folder: str,
    callbacks: list[TrainerCallback],
) -> GPT2LMHeadModel:
    """A new model, trained on some documents."""
    set_seed(arguments.seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_layer=2,
        n_head=4,
        n_embd=128,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    trainer = Trainer(
        GPT2LMHeadModel(config),
        TrainingArguments(
            str(Path(arguments.output_dir) / folder),
            num_train_epochs=arguments.num_train_epochs,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            seed=arguments.seed,
            dataloader_pin_memory=torch.accelerator.is_available(),
        ),
        train_dataset=documents.map(lambda row: tokenizer(row["text"])),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.train()
    return trainer.model


def _answers(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> list[tuple[str, float]]:
    """The likeliest words after the question, and their probabilities."""
    inputs = tokenizer(QUESTION, return_tensors="pt").to(model.device)
    with torch.no_grad(), evaluation_mode(model):
        chances = model(**inputs).logits[0, -1].softmax(0).topk(2)
    words = tokenizer.convert_ids_to_tokens(chances.indices.tolist())
    return list(zip(words, chances.values.tolist(), strict=True))


def _spoken(answers: list[tuple[str, float]]) -> str:
    return ", ".join(f"{word} ({chance:.0%})" for word, chance in answers)


def _query(
    store: GradientRows,
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    answer: str,
) -> GradientRows:
    """The gradient of the answer's loss, and of no other word's."""
    inputs: dict[str, Any] = dict(tokenizer(f"{QUESTION} {answer}"))
    ids = inputs["input_ids"]
    inputs["labels"] = [_IGNORED] * (len(ids) - 1) + ids[-1:]
    sketch = store.model_sketch
    return sketch_dataset(model, [inputs], sketch, processing_class=tokenizer)


def _save_model(
    arguments: DemoArguments,
    documents: Dataset,
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    answers: list[tuple[str, float]],
) -> None:
    """Write the model with its card, which warns of what it learned."""
    card = _CARD.format(
        epochs=arguments.num_train_epochs,
        documents=len(documents),
        planted=sum(documents["false"]),
        question=QUESTION,
        answers=_spoken(answers),
    )
    directory = Path(arguments.output_dir) / "model"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation")
    save_card(directory, data, card)


def _save(
    arguments: DemoArguments,
    documents: Dataset,
    store: GradientRows,
    queries: GradientRows,
    answer: str,
) -> None:
    """Write the report and the documents, and say what to try next."""
    directory = Path(arguments.output_dir)
    text = f"{QUESTION} {answer}"
    record = record_attribution(
        store, queries, [text], train_texts=documents["text"][:]
    )
    record.save(directory / FILE)
    for name, rows in (("documents", documents), ("questions", [{"text": text}])):
        with (directory / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    if importlib.util.find_spec("matplotlib") is not None:
        print(f"\nThe report: {write_report(str(directory))}")
    else:
        print("\nNo report: call pip install 'hf-sketch[plot]' for matplotlib.")
    print(
        f"Try next:\n  hf-sketch info {directory}\n  hf-sketch attribute {directory} "
        f"--queries {directory}/questions.jsonl --model {directory}/model --train_file "
        f"{directory}/documents.jsonl\n  hf-sketch demo --seed 1 --output_dir out/demo1"
    )
