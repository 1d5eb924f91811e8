"""Answer queries from a store: which training examples moved the model."""

from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_sketch import (
    GradientRows,
    Influence,
    load_sketches,
    load_spectra,
    sketch_dataset,
)
from hf_sketch.attribution.answers import check_lines
from hf_sketch.attribution.methods import METHOD_NAMES, Method, check_damping
from hf_sketch.attribution.record import (
    FILE,
    AttributionRecord,
    QueryRecord,
    check_token_method,
    record_attribution,
)
from hf_sketch.processes import processes
from hf_sketch.recipes.options.attribute import AttributeArguments
from hf_sketch.recipes.options.wikitext import WikitextArguments
from hf_sketch.recipes.texts.data_files import check_texts, read_data_file
from hf_sketch.recipes.texts.shown import read_trained_rows, shortened, texts_of
from hf_sketch.recipes.texts.text_rows import (
    TextModel,
    load_text_model,
    text_columns,
    token_losses,
    token_rows,
    tokenized,
)
from hf_sketch.sketches.choices import check_choice, check_count
from hf_sketch.store.locations import is_remote, store_directory


def run_attribute(
    arguments: AttributeArguments, directories: list[str]
) -> AttributionRecord:
    """Attribute, print and save.

    Raises:
        ValueError: there is not one store, or an argument is bad.
        FileNotFoundError: a file or the store is not there.
    """
    if len(directories) != 1:
        raise ValueError(
            f"attribute takes one store, got {len(directories)}: join them with "
            "hf-sketch merge."
        )
    check_answers(arguments)
    check_count("max_queries", arguments.max_queries)
    store = load_sketches(directories[0]).over_processes()
    text_model = load_text_model(arguments.model)
    rows = read_data_file(arguments.queries)
    rows = rows.select(range(min(arguments.max_queries, len(rows))))
    train = None
    if arguments.train_file is not None:
        train = read_trained_rows(store, arguments.train_file)
    method = method_of(store, arguments.method, arguments.damping)
    record = attribute_texts(
        store,
        text_model,
        rows,
        train,
        text_columns(rows, text_model.kind, arguments.text_columns),
        max_length=arguments.max_length,
        batch_size=arguments.batch_size,
        token_scores=arguments.token_scores,
        method=method,
        layers=layers_of(arguments.layers),
        top_k=arguments.top_k,
        bottom_k=arguments.bottom_k,
    )
    if processes().is_main_process:
        print_record(record)
        path = Path(arguments.output_file or _beside(directories[0]))
        record.save(path)
        print(f"saved {path}")
    return record


def _beside(directory: str) -> Path:
    """Where the answers go by default: beside a store, or here if that is far away."""
    if is_remote(directory):
        return Path(FILE)
    return store_directory(directory).parent / FILE


def check_answers(arguments: AttributeArguments | WikitextArguments) -> None:
    """Check how queries are to be answered, before anything is loaded.

    Raises:
        ValueError: an argument is bad, or takes no other that is given.
    """
    name, damping = arguments.method, arguments.damping
    check_choice("method", name, (*METHOD_NAMES, "influence"))
    if damping is not None:
        check_damping(damping)
        if name not in ("preconditioned", "influence"):
            raise ValueError(
                f"damping is for preconditioned and influence, got it for {name!r}: "
                "leave it out."
            )
    if arguments.token_scores:
        check_token_method(name)
    check_lines(arguments.top_k, arguments.bottom_k)


def layers_of(listed: str | None) -> dict[str, float] | None:
    """Return groups of layers and their weights, listed as "a,b=0.5".

    Raises:
        ValueError: a weight is no number.
    """
    if listed is None:
        return None
    named = [part.partition("=") for part in listed.split(",")]
    return {name: float(weight) if given else 1.0 for name, given, weight in named}


def method_of(store: GradientRows, name: str, damping: float | None) -> str | Method:
    """The method of a name.

    Raises:
        FileNotFoundError: influence needs a spectrum, and there is none.
    """
    settings = {} if damping is None else {"damping": damping}
    if name == "preconditioned":
        return store.preconditioned(**settings)
    if name == "influence":
        directory = store.directory and store.directory.parent
        return Influence(load_spectra(str(directory))[-1], **settings)
    return name


def attribute_texts(
    store: GradientRows,
    text_model: TextModel,
    queries: Dataset,
    train: Dataset | None,
    columns: list[str],
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    token_scores: bool = False,
    **options: Any,
) -> AttributionRecord:
    """Sketch the queries at the model's weights and attribute them.

    Args:
        store: the rows of training.
        text_model: model and tokenizer, at the weights used for the queries.
        queries: rows with texts.
        train: the rows trained on, in the order of their ids; None if not at hand.
        columns: columns of the texts, in both data sets.
        max_length: tokens that are kept.
        batch_size: queries in one pass.
        token_scores: sketch each token of a query, too.
        options: for `record_attribution`.

    Raises:
        ValueError: scores of tokens of a model that is not causal.
    """
    sketch = partial(
        sketch_dataset,
        text_model.model,
        model_sketch=store.model_sketch,
        batch_size=batch_size,
        data_collator=text_model.collator,
    )
    inputs = tokenized(queries, text_model, columns, max_length, "the queries")
    if train is not None:
        check_texts(train, columns, "the training rows")
    sketches = sketch(inputs)
    tokens = None
    if text_model.kind == "causal":
        tokens = [token_losses(text_model, row) for row in inputs]
        if token_scores:
            options["token_sketches"] = [sketch(token_rows(row)) for row in inputs]
    elif token_scores:
        raise ValueError(
            f"token_scores are of causal language models, got a {text_model.kind} "
            "model: leave them out."
        )
    return record_attribution(
        store,
        sketches,
        texts_of(queries, columns),
        train_texts=None if train is None else texts_of(train, columns),
        tokens=tokens,
        **options,
    )


def print_record(record: AttributionRecord) -> None:
    """Each query with its proponents and its opponents."""
    for query in record.queries:
        print(
            f"\nQuery {query.query_id}, loss {query.loss:.3f}: {shortened(query.text)}"
        )
        _print_side(query, "Proponents (training on them lowered this loss)", 1)
        _print_side(query, "Opponents (training on them raised it)", -1)


def _print_side(query: QueryRecord, title: str, sign: int) -> None:
    lines = [line for line in query.lines if sign * line["score"] > 0]
    lines = [line for line in lines if (line["rank"] >= 0) == (sign > 0)]
    if lines:
        print(f"  {title}")
    for line in lines[::sign]:
        text = shortened(line.get("text", ""))
        print(f"    {line['score']:+10.4g}  #{line['example_id']:<6} {text}")
