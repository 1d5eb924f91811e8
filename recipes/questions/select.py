"""Which rows of a pool serve a target best."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import TrainingArguments, set_seed

from hf_sketch import GradientRows, load_sketches
from hf_sketch.durable import replace_file
from hf_sketch.recipes.options.select import SELECT_TRAINING, SelectArguments
from hf_sketch.recipes.selection.baselines import (
    bm25_scores,
    check_baselines,
    random_scores,
    rds_scores,
)
from hf_sketch.recipes.selection.choice import (
    best_rows,
    diverse_rows,
    over_tasks,
)
from hf_sketch.recipes.selection.comparison import (
    compared_settings,
    loss_after,
    print_comparison,
)
from hf_sketch.recipes.selection.recording import (
    PoolRows,
    recorded_pool,
    sketched,
    trained_model,
    with_adapters,
)
from hf_sketch.recipes.texts.data_files import (
    check_columns,
    count_or_share,
    read_data_file,
)
from hf_sketch.recipes.texts.shown import check_trained_rows, shortened, texts_of
from hf_sketch.recipes.texts.text_rows import (
    TextModel,
    load_text_model,
    text_columns,
    tokenized,
)
from hf_sketch.recipes.training_defaults import with_defaults
from hf_sketch.sketches.choices import check_choice, check_count, check_setting

_CANDIDATES = 5  # candidates considered for diversity, per chosen row
_SHOWN = 10

SelectTrainingArguments = with_defaults(
    TrainingArguments, SELECT_TRAINING, "SelectTrainingArguments", __name__
)


@dataclass(frozen=True)
class _Data:
    """Rows of a file: as they are, and as the model's inputs."""

    rows: Dataset
    texts: list[str]
    inputs: Dataset

    def select(self, places: range) -> "_Data":
        """Some of them."""
        texts = [self.texts[place] for place in places]
        return _Data(self.rows.select(places), texts, self.inputs.select(places))


def run_select(
    arguments: SelectArguments, training: TrainingArguments
) -> dict[str, Any]:
    """Record, score, choose, save, print and optionally compare.

    Returns:
        chosen: numbers of the chosen rows, best first; compared: mean loss of held-out
        queries, low and high end of its 90% interval, by choice.

    Raises:
        ValueError: an argument or a row is bad.
        FileNotFoundError: a file is not there.
    """
    baselines = (arguments.baseline or "").split(",") if arguments.baseline else []
    _check(arguments, baselines)
    set_seed(training.seed)
    text_model = load_text_model(arguments.model_name_or_path)
    pool = _read(arguments, text_model, arguments.train_file)
    queries = _read(arguments, text_model, arguments.query_file)
    rows = len(pool.rows)
    count = count_or_share("--keep", arguments.keep, rows, rows)
    _tasks(arguments, queries)  # before training
    held_out = queries
    if baselines:
        check_count("the number of queries", len(queries.rows), least=4)
        held_out = queries.select(range(1, len(queries.rows), 2))
        queries = queries.select(range(0, len(queries.rows), 2))
    scores, chosen = _by_gradients(arguments, training, pool, queries, count)
    _save(Path(arguments.output_file), pool, scores, chosen)
    _print(pool, scores, chosen)
    choices = {"gradients": chosen}
    for name in baselines:
        found = _baseline_scores(name, text_model, pool, queries, training.seed)
        if found.dim() == 2:
            tasks = _tasks(arguments, queries)
            found = over_tasks(found, tasks, arguments.over_tasks)
        choices[name] = best_rows(found, count)
    compared: dict[str, list[float]] = {}
    for name, rows in (choices if baselines else {}).items():
        part = pool.inputs.select(rows.tolist())
        settings = compared_settings(training, name, arguments.compare_epochs)
        model = _new_model(arguments)
        compared[name] = loss_after(model, part, held_out.inputs, settings)
    if compared:
        print_comparison(choices, compared)
    return {"chosen": chosen.tolist(), "compared": compared}


def _check(arguments: SelectArguments, baselines: list[str]) -> None:
    check_baselines(baselines)
    check_choice("over_tasks", arguments.over_tasks, ("max", "mean"))
    for name in ("max_length", "out_size", "lora_rank"):
        check_count(name, getattr(arguments, name))
    weight, share = arguments.diversity, arguments.warmup_share
    check_setting("diversity", 0 <= weight < 1, "in [0, 1)", weight)
    check_setting("warmup_share", 0 < share < 1, "in (0, 1)", share)


def _read(arguments: SelectArguments, text_model: TextModel, file: str) -> _Data:
    rows = read_data_file(file)
    columns = text_columns(rows, text_model.kind, arguments.text_columns)
    inputs = tokenized(rows, text_model, columns, arguments.max_length, file)
    return _Data(rows, texts_of(rows, columns), inputs)


def _tasks(arguments: SelectArguments, queries: _Data) -> list[str]:
    """The task of each query; one for all without the column."""
    if arguments.task_column not in queries.rows.column_names:
        if arguments.task_column != SelectArguments.task_column:
            check_columns(queries.rows, [arguments.task_column], "query_file")
        return [""] * len(queries.rows)
    return [str(task) for task in queries.rows[arguments.task_column]]


def _by_gradients(
    arguments: SelectArguments,
    training: TrainingArguments,
    pool: _Data,
    queries: _Data,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Scores of the pool and the rows chosen by them, (rows,) and (count,)."""
    text_model, store = _recorded(arguments, training, pool)
    rows = PoolRows.of(text_model, store, pool.inputs)
    scores = rows.scores(sketched(text_model, store, queries.inputs))
    total = over_tasks(scores, _tasks(arguments, queries), arguments.over_tasks)
    if not arguments.diversity:
        return total, best_rows(total, count)
    candidates = best_rows(total, _CANDIDATES * count)
    directions = rows.directions(candidates.tolist())
    places = diverse_rows(total[candidates], directions, count, arguments.diversity)
    return total, candidates[places]


def _recorded(
    arguments: SelectArguments, training: TrainingArguments, pool: _Data
) -> tuple[TextModel, GradientRows]:
    """The trained model and the rows of the pool: those at hand, or of a new run."""
    if arguments.sketches is not None:
        store = load_sketches(arguments.sketches)
        check_trained_rows(store, pool.rows, arguments.train_file)
        return trained_model(arguments.sketches), store
    text_model = _new_model(arguments)
    store = recorded_pool(
        text_model,
        pool.inputs,
        training,
        warmup_share=arguments.warmup_share,
        out_size=arguments.out_size,
    )
    return text_model, store


def _new_model(arguments: SelectArguments) -> TextModel:
    """The model with new adapters."""
    text_model = load_text_model(arguments.model_name_or_path)
    return with_adapters(text_model, arguments.lora_rank)


def _baseline_scores(
    name: str, text_model: TextModel, pool: _Data, queries: _Data, seed: int
) -> Tensor:
    """Scores of a baseline, (rows,) or (queries, rows)."""
    if name == "random":
        return random_scores(len(pool.rows), seed)
    if name == "bm25":
        return bm25_scores(pool.texts, queries.texts)
    return rds_scores(text_model, pool.inputs, queries.inputs)


def _save(path: Path, pool: _Data, scores: Tensor, chosen: Tensor) -> None:
    lines = [
        {**pool.rows[place], "example_id": place, "score": float(scores[place])}
        for place in chosen.tolist()
    ]
    text = "".join(json.dumps(line, default=str) + "\n" for line in lines)
    replace_file(path, text.encode())


def _print(pool: _Data, scores: Tensor, chosen: Tensor) -> None:
    print(f"Chose {len(chosen):,} of {len(pool.rows):,} rows. The best:")
    for place in chosen[:_SHOWN].tolist():
        text = shortened(pool.texts[place])
        print(f"  {float(scores[place]):+.4f}  #{place:<6} {text}")
