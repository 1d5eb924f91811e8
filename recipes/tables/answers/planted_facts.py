"""Whether scores of tokens find the planted fact within a training example."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    set_seed,
)

from hf_sketch import CounterRandom, GradientRows, ModelSketch, sketch_dataset
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.texts.country_facts import word_tokenizer
from hf_sketch.recipes.training_defaults import with_small

_TINY = {"facts": 4, "repeats": 2, "epochs": "1", "out_size": 128, "seeds": 1}
_TINY |= {"asked": 2}
_IGNORED = -100  # a label that has no loss
_FACT = "the key of name{name} is code{code} ."
_CODE = 6  # its place in a question, behind the token that starts a text
_FILLERS = 60  # different words around the facts
_METHODS = ("dot", "preconditioned")


@dataclass
class PlantedFactsArguments(ReportArguments):
    """Shares of a score that the tokens of a planted fact have.

    Each document says one fact, "the key of NAME is CODE .", amid random words. A query
    is the same sentence alone, and its loss is that of the code. Scores are taken at
    several states of the model, of rows and queries at the same state.
    """

    facts: int = field(default=40, metadata={"help": "Different facts."})
    repeats: int = field(default=8, metadata={"help": "Documents per fact."})
    words: int = field(default=12, metadata={"help": "Random words per document."})
    epochs: str = field(
        default="3,6,9,12,15,18,24", metadata={"help": "States that are asked."}
    )
    out_size: int = field(default=4096, metadata={"help": "Numbers in a sketch."})
    seeds: int = field(default=3, metadata={"help": "Trainings and maps."})
    asked: int = field(default=20, metadata={"help": "Documents per state."})
    tiny: bool = field(default=False, metadata={"help": "A few facts, as a check."})


@dataclass(frozen=True)
class Documents:
    """Tokenized documents with facts.

    Args:
        tokenizer: tokenizer that splits into words.
        documents: tokenized, with the number of the fact and of the words before it.
        questions: the facts alone, tokenized, with the label of the code only.
    """

    tokenizer: PreTrainedTokenizerFast
    documents: Dataset
    questions: Dataset

    @classmethod
    def made(cls, facts: int, repeats: int, words: int, seed: int) -> "Documents":
        """Make them, with the same words for all seeds in other orders."""
        fillers = [f"word{i}" for i in range(_FILLERS)]
        codes = CounterRandom(seed, "codes").permutation(facts).tolist()
        alone = [_FACT.format(name=i, code=code) for i, code in enumerate(codes)]
        texts: list[str] = []
        before: list[int] = []
        for number in range(facts * repeats):
            order = CounterRandom(seed, f"words/{number}").permutation(_FILLERS)
            some = [fillers[i] for i in order[:words].tolist()]
            before.append(int(order[-1]) % (words + 1))
            parts = some[: before[-1]], [alone[number % facts]], some[before[-1] :]
            texts.append(" ".join(word for part in parts for word in part))
        tokenizer = word_tokenizer(texts)
        ids = tokenizer(texts)["input_ids"]
        fact = [number % facts for number in range(len(texts))]
        columns = {"input_ids": ids, "labels": ids, "fact": fact, "before": before}
        asked = tokenizer(alone)["input_ids"]
        labels = [[_IGNORED] * len(row) for row in asked]
        for label, row in zip(labels, asked, strict=True):
            label[_CODE] = row[_CODE]
        questions = Dataset.from_dict({"input_ids": asked, "labels": labels})
        return cls(tokenizer, Dataset.from_dict(columns), questions)


def states(
    made: Documents, arguments: PlantedFactsArguments, seed: int
) -> Iterator[tuple[int, GPT2LMHeadModel]]:
    """Train a small model on the documents, and yield it after some epochs."""
    set_seed(seed)
    config = GPT2Config(
        vocab_size=len(made.tokenizer),
        n_layer=2,
        n_head=4,
        n_embd=64,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=made.tokenizer.bos_token_id,
        eos_token_id=made.tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    ids = torch.tensor(made.documents["input_ids"][:])
    epochs = [int(epoch) for epoch in arguments.epochs.split(",")]
    for epoch in range(1, max(epochs) + 1):
        for some in torch.randperm(len(ids)).split(16):
            model(input_ids=ids[some], labels=ids[some]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if epoch in epochs:
            yield epoch, model


def shares(
    rows: GradientRows, model: Any, made: Documents, number: int, method: str
) -> dict[str, float]:
    """Shares of the fact's tokens in the score of its own document.

    Returns:
        of the score, and of the sum of the tokens' absolute scores; the same of the
        code's token alone; and how far the matrix's sum is from the store's score, as a
        share of its absolute sum and of the score.
    """
    document = made.documents[number]
    question = made.questions[document["fact"]]
    options = {"processing_class": made.tokenizer, "batch_size": 32}
    found = rows.token_scores(
        model, made.documents, number, question, method, **options
    )
    by_token = found.scores.sum(1)
    places = torch.tensor(found.example_places) - document["before"]
    fact, code = (places > 0) & (places <= _CODE + 1), places == _CODE
    total, absolute = by_token.sum(), by_token.abs().sum()
    return {
        "fact": float(by_token[fact].sum() / total),
        "fact_absolute": float(by_token[fact].abs().sum() / absolute),
        "code": float(by_token[code].sum() / total),
        "code_absolute": float(by_token[code].abs().sum() / absolute),
        "off": abs(float(total) - found.stored) / float(found.scores.abs().sum()),
        "off_of_score": abs(float(total) / found.stored - 1),
    }


def measure(
    made: Documents, model: Any, arguments: PlantedFactsArguments, seed: int
) -> dict[str, dict[str, Any]]:
    """Return each method's shares over some documents, at one state of the model."""
    sketch = ModelSketch.from_model(model, arguments.out_size, "grouped", seed)
    options: dict[str, Any] = {"processing_class": made.tokenizer, "batch_size": 64}
    rows = sketch_dataset(model, made.documents, sketch, **options)
    queries = sketch_dataset(model, made.questions, sketch, **options)
    facts = torch.tensor(made.documents["fact"][:])
    found: dict[str, dict[str, Any]] = {}
    for method in _METHODS:
        first = rows.scores(queries, method).argmax(1)
        lines = [
            shares(rows, model, made, number, method)
            for number in range(min(arguments.asked, len(facts)))
        ]
        found[method] = {
            "top_row_says_the_fact": float(
                (facts[first] == torch.arange(len(first))).double().mean()
            ),
            **{name: [line[name] for line in lines] for name in lines[0]},
        }
    loss = torch.tensor(queries.dataset["loss"][:]).median()
    return {"query_loss": float(loss), **found}


def run_planted_facts(arguments: PlantedFactsArguments) -> dict[str, Any]:
    """Train, divide scores among tokens, print and save."""
    arguments = with_small(arguments, _TINY if arguments.tiny else {})
    results: dict[str, Any] = {}
    for seed in range(arguments.seeds):
        sizes = arguments.facts, arguments.repeats, arguments.words
        made = Documents.made(*sizes, seed)
        for epoch, model in states(made, arguments, seed):
            found = measure(made, model, arguments, seed)
            results.setdefault(str(epoch), []).append(found)
            _print(seed, epoch, found)
    name = "planted_facts"
    print("saved", save_report(arguments.output_dir, name, arguments, results))
    return results


def _print(seed: int, epoch: int, found: dict[str, Any]) -> None:
    for method in _METHODS:
        means = {
            name: mean(values) if isinstance(values, list) else values
            for name, values in found[method].items()
        }
        parts = ", ".join(f"{name} {value:.3g}" for name, value in means.items())
        loss = found["query_loss"]
        print(f"seed {seed}, epoch {epoch}, loss {loss:.3f}, {method}: {parts}")


if __name__ == "__main__":
    parser = HfArgumentParser(PlantedFactsArguments)
    run_planted_facts(*parser.parse_args_into_dataclasses())
