"""Scores divided among tokens, beside the gradients of single tokens by autograd."""

import copy

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import BertConfig, BertForMaskedLM

from hf_sketch import GradientRows, ModelSketch, sketch_dataset
from tests.helpers.trained.tiny_models import tiny_model

IDS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [15, 16, 17], [5, 6, 9, 2]]
LABELS = [[5, 6, 7, 8], [9, 10, -100, 12, 13, -100], [15, 16, 17], [5, 6, 9, 2]]


def dataset():
    masks = [[1] * len(ids) for ids in IDS]
    return Dataset.from_dict(
        {"input_ids": IDS, "attention_mask": masks, "labels": LABELS}
    )


def collate(examples):
    (example,) = examples
    return {name: torch.tensor([value]) for name, value in example.items()}


@pytest.fixture(scope="module", params=["llama", "bert-masked"])
def model(request):
    if request.param == "llama":
        return tiny_model("llama", torch.float32)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=20, intermediate_size=8, **sizes)
    return BertForMaskedLM(config).eval()


def rows_of_tokens(model, sketch, example):
    """The sketched gradient of each token's loss, by autograd, divided by their number.

    A causal model predicts a token one place before it, a masked one in its place.
    """
    shift = int("Llama" in type(model).__name__)
    inputs = collate([{k: v for k, v in example.items() if k != "labels"}])
    rows, places = [], []
    for place, label in enumerate(example["labels"]):
        if label == -100 or place < shift:
            continue
        logits = model(**inputs).logits[0, place - shift]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(label))
        named = dict(model.named_parameters())
        found = torch.autograd.grad(
            loss, list(named.values()), materialize_grads=True, allow_unused=True
        )
        rows.append(sketch.sketch(dict(zip(named, found, strict=True))))
        places.append(place)
    return torch.stack(rows).double() / len(rows), places


@pytest.fixture(scope="module")
def sketch(model):
    return ModelSketch.from_model(model, 64)


@pytest.fixture(scope="module")
def rows(model, sketch):
    return sketch_dataset(model, dataset(), sketch, data_collator=collate, batch_size=1)


@pytest.mark.parametrize("method", ["dot", "preconditioned"])
def test_the_matrix_is_that_of_single_tokens_and_adds_up_to_the_score(
    model, sketch, rows, method
):
    data = dataset()
    options = {"data_collator": collate, "batch_size": 2}
    found = rows.token_scores(model, data, 1, data[0], method, **options)
    left, places = rows_of_tokens(model, sketch, data[1])
    right, query_places = rows_of_tokens(model, sketch, data[0])
    assert found.example_places == places
    assert found.query_places == query_places
    if method == "preconditioned":
        every = torch.tensor(rows.dataset["sketch"][:], dtype=torch.float64)
        c = every.T @ every / len(every)
        c += c.trace() / len(every) * torch.eye(len(c))
        right = torch.linalg.solve(c, right.T).T
    expected = left @ right.T
    near = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(found.scores, expected, rtol=0, atol=near)
    score = float(rows.where(example_id=1).scores(rows[0], method))
    rounding = 1e-6 * float(found.scores.abs().sum())  # where parts cancel
    assert found.stored == pytest.approx(score, rel=1e-5, abs=rounding)
    assert float(found.scores.sum()) == pytest.approx(score, rel=1e-5, abs=rounding)
    assert "divided among" in repr(found)


def test_rows_that_are_sums_over_tokens_are_divided_without_their_number(model, sketch):
    data = dataset()
    options = {"data_collator": collate, "method": "dot"}
    rows = sketch_dataset(
        model, data, sketch, data_collator=collate, loss="sum", batch_size=1
    )
    found = rows.token_scores(model, data, 1, data[0], loss="sum", **options)
    score = float(rows.where(example_id=1).scores(rows[0], "dot"))
    assert float(found.scores.sum()) == pytest.approx(score, rel=1e-5)
    with pytest.raises(ValueError, match=r"do not add up.*the loss that rows are"):
        rows.token_scores(model, data, 1, data[0], **options)


def test_a_row_of_training_takes_the_weights_it_was_recorded_at(model, sketch, rows):
    data = dataset()
    later = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in later.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    dataset_ = rows.dataset.add_column("step", [1] * len(rows))
    dataset_ = dataset_.add_column("learning_rate", [0.5] * len(rows))
    dataset_ = dataset_.add_column("weight", [0.25] * len(rows))
    run = GradientRows(sketch, dataset_)
    options = {"data_collator": collate, "method": "tracin"}
    found = run.token_scores(later, data, 1, data[0], row_model=model, **options)
    asked = sketch_dataset(later, data.select([0]), sketch, data_collator=collate)
    score = float(run.where(example_id=1).scores(asked, "tracin"))
    assert float(found.scores.sum()) == pytest.approx(score, rel=1e-5)
    with pytest.raises(ValueError, match=r"do not add up to its row.*row_model"):
        run.token_scores(later, data, 1, data[0], **options)


def test_what_has_no_tokens_or_several_rows_is_refused(model, sketch, rows):
    data = dataset()
    options = {"data_collator": collate}
    with pytest.raises(ValueError, match="A cosine is not a sum over tokens"):
        rows.token_scores(model, data, 1, data[0], "cosine", **options)
    twice = GradientRows(sketch, concatenate_datasets([rows.dataset] * 2))
    with pytest.raises(ValueError, match=r"has 2 rows of example 1.*where\(step"):
        twice.token_scores(model, data, 1, data[0], **options)
    with pytest.raises(ValueError, match=r"need labels of tokens.*got None"):
        rows.token_scores(model, data.remove_columns("labels"), 1, data[0], **options)
