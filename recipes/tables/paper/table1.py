"""The score half of Tables 1 and 5: gradients of one layer beside a sketch of all."""

from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, HfArgumentParser

from hf_sketch import ModelSketch, sketch_dataset
from hf_sketch.attribution.evaluation import score_correlation
from hf_sketch.recipes.saved_report import ReportArguments, save_report
from hf_sketch.recipes.tables.models.exact_products import exact_products
from hf_sketch.recipes.tables.models.gradients import (
    BATCH_SIZE,
    fine_tune,
    fine_tuned_minilm,
)
from hf_sketch.recipes.tables.paper.table1_eigenvalues import layers_of
from hf_sketch.recipes.texts.data_files import read_data_file
from hf_sketch.recipes.texts.entailment import check_files, load_pairs
from hf_sketch.recipes.texts.minilm import embedded_model_path
from hf_sketch.recipes.texts.text_rows import (
    TextModel,
    load_text_model,
    text_columns,
    tokenized,
)
from hf_sketch.recipes.training_defaults import with_small

# Least and greatest r of a layer (Schioppa 2024, Tables 1 and 5).
PAPER = {"GPT-2": (0.16, 0.90), "BART": (0.41, 0.91)}
_TINY = {"rows": 4, "queries": 2, "steps": 1, "seeds": 2, "bits": 6, "max_length": 16}


@dataclass
class Table1Arguments(ReportArguments):
    """Pearson r of scores by single layers' gradients, and by sketches of all.

    A score is the inner product of the gradients of a query and a training row.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Model; MiniLM on pairs of sentences by default."},
    )
    train_file: str | None = field(
        default=None,
        metadata={"help": "Its texts; for MiniLM SNLI rows, by default our own pairs."},
    )
    max_length: int = field(default=128, metadata={"help": "Tokens that are kept."})
    rows: int = field(default=120, metadata={"help": "Training rows scored."})
    queries: int = field(default=30, metadata={"help": "Queries, of other rows."})
    steps: int = field(
        default=100, metadata={"help": "AdamW steps beforehand, of 16 rows each."}
    )
    operator: str = field(
        default="srht", metadata={"help": "Operator of the sketches."}
    )
    bits: int = field(default=12, metadata={"help": "log2 of the sketch size."})
    seeds: int = field(
        default=5, metadata={"help": "Number of sketches; the median is printed."}
    )
    tiny: bool = field(default=False, metadata={"help": "A few rows, as a check."})
    validation_file: str | None = field(
        default=None, metadata={"help": "SNLI rows of the queries, for MiniLM."}
    )


@dataclass(frozen=True)
class Study:
    """A fine-tuned model and what its gradients are taken of.

    Args:
        text_model: the model.
        rows: tokenized, of its training.
        queries: tokenized, others.
    """

    text_model: TextModel
    rows: Dataset
    queries: Dataset


def minilm_study(arguments: Table1Arguments) -> Study:
    """MiniLM on SNLI or our own pairs, with validation pairs as queries.

    Raises:
        ValueError: one of the two files is given without the other.
    """
    files = arguments.train_file, arguments.validation_file
    check_files(*files)
    model = fine_tuned_minilm(arguments.steps, 0, arguments.train_file)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    text_model = TextModel("classification", model, tokenizer)
    splits = zip(("train", "validation"), files, strict=True)
    trained, asked = (load_pairs(split, file) for split, file in splits)
    trained = trained.shuffle(seed=0).select(range(arguments.rows))
    asked = asked.select(range(arguments.queries))
    columns = ("premise", "hypothesis")
    rows, queries = (
        tokenized(pairs, text_model, columns, arguments.max_length)
        for pairs in (trained, asked)
    )
    return Study(text_model, rows, queries)


def text_study(arguments: Table1Arguments) -> Study:
    """A model of one's own; of a language model, on texts of full length only.

    Raises:
        ValueError: there is no file, or it has too few rows.
    """
    if arguments.train_file is None:
        raise ValueError(
            f"{arguments.model_name_or_path} needs texts to train on, got none. Pass "
            "--train_file."
        )
    text_model = load_text_model(arguments.model_name_or_path)
    data = read_data_file(arguments.train_file)
    columns = text_columns(data, text_model.kind)
    data = tokenized(data, text_model, columns, arguments.max_length)
    if text_model.kind == "causal":
        whole = [len(ids) == arguments.max_length for ids in data["input_ids"]]
        data = data.select([place for place, is_whole in enumerate(whole) if is_whole])
    last = max(arguments.rows, BATCH_SIZE * arguments.steps) + arguments.queries
    if len(data) < last:
        raise ValueError(
            f"{arguments.train_file} must have at least {last} rows that fill "
            f"max_length={arguments.max_length}, got {len(data)}: pass fewer --steps, "
            "or a smaller --max_length."
        )
    trained = data.select(range(BATCH_SIZE * arguments.steps)).to_list()
    lows = range(0, len(trained), BATCH_SIZE)
    batches = (text_model.collator(trained[p : p + BATCH_SIZE]) for p in lows)
    fine_tune(text_model.model, batches)  # in evaluation mode
    queries = data.select(range(last - arguments.queries, last))
    return Study(text_model, data.select(range(arguments.rows)), queries)


def sketched_scores(study: Study, sketch: ModelSketch) -> Tensor:
    """(queries, rows), of sketches."""
    rows, queries = (
        sketch_dataset(
            study.text_model.model,
            examples,
            sketch,
            data_collator=study.text_model.collator,
        )
        for examples in (study.rows, study.queries)
    )
    return rows.scores(queries, "dot")


def measure(study: Study, arguments: Table1Arguments) -> dict[str, Any]:
    """Correlations with the scores of exact gradients of the whole model."""
    model = study.text_model.model
    products = exact_products(
        model,
        study.rows.to_list(),
        study.queries.to_list(),
        study.text_model.collator,
        layers_of(model),
    )
    whole = torch.stack([part.double() for part in products.values()]).sum(0)
    sketched: list[float] = []
    for seed in range(arguments.seeds):
        size = 2**arguments.bits
        sketch = ModelSketch.from_model(
            model, size, seed=seed, operator=arguments.operator
        )
        sketched.append(score_correlation(sketched_scores(study, sketch), whole))
    return {
        "elements": sum(p.numel() for p in model.parameters()),
        "layers": {n: score_correlation(part, whole) for n, part in products.items()},
        "sketch": sketched,
    }


def run_table1(arguments: Table1Arguments) -> dict[str, Any]:
    """Measure, print beside the paper's figures, and save."""
    if arguments.tiny:
        arguments = with_small(arguments, _TINY)
    ours = arguments.model_name_or_path is None
    study = minilm_study(arguments) if ours else text_study(arguments)
    results = measure(study, arguments)
    print("Pearson r with the scores of exact gradients of the whole model")
    found = results["sketch"]
    print(
        f"  {arguments.operator} sketch of 2^{arguments.bits}: {median(found):.4f} "
        f"({min(found):.4f}..{max(found):.4f})"
    )
    for name, r in results["layers"].items():
        print(f"  {name:20s} {r:.4f}")
    for name, (least, greatest) in PAPER.items():
        print(f"  the paper's layers of {name}: {least} to {greatest}")
    path = save_report(arguments.output_dir, "table1", arguments, results)
    print("saved", path)
    return results


if __name__ == "__main__":
    torch.manual_seed(0)
    run_table1(*HfArgumentParser(Table1Arguments).parse_args_into_dataclasses())
