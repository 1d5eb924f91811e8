"""Questions as users put them: texts, unsketched rows, data without labels."""

import pytest
import torch
from datasets import Dataset

from hf_sketch import ModelSketch, sketch_dataset
from tests.helpers.rows_in_memory import random_matrix, rows_of
from tests.helpers.trained.tiny_models import tiny_model

SENTENCES = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [15, 16, 17]]


class Tokenizer:
    """Gives a token to each letter, and pads on one side."""

    def __init__(self, padding_side="right"):
        self.padding_side = padding_side

    def __call__(self, text):
        ids = [ord(letter) - ord("a") for letter in text]
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def pad(self, examples, return_tensors, padding_side=None):
        assert return_tensors == "pt"
        side = padding_side or self.padding_side
        width = max(len(example["input_ids"]) for example in examples)

        def padded(row):
            missing = [0] * (width - len(row))
            return missing + row if side == "left" else row + missing

        return {
            name: torch.tensor([padded(example[name]) for example in examples])
            for name in examples[0]
        }


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama").eval()


@pytest.fixture(scope="module")
def sketch(model):
    return ModelSketch.from_model(model, 256)


def dataset(**more):
    masks = [[1] * len(ids) for ids in SENTENCES]
    return Dataset.from_dict({"input_ids": SENTENCES, "attention_mask": masks, **more})


def gradient_of(model, sketch, ids):
    """The sketched gradient of a text's loss, by autograd."""
    model.zero_grad()
    ids = torch.tensor([ids])
    model(input_ids=ids, labels=ids).loss.backward()
    row = sketch.sketch({n: p.grad for n, p in model.named_parameters()})
    model.zero_grad()
    return row


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_tokens_are_padded_beside_them(model, sketch, side):
    data = dataset(labels=SENTENCES)
    got = sketch_dataset(model, data, sketch, processing_class=Tokenizer(side))
    rows = got.dataset.with_format("torch")["sketch"][:]
    for row, ids in zip(rows, SENTENCES, strict=True):
        expected = gradient_of(model, sketch, ids)
        torch.testing.assert_close(row, expected.float(), rtol=1e-4, atol=1e-5)


def test_missing_labels_are_named(model, sketch):
    with pytest.raises(
        ValueError, match=r"none for the inputs \['input_ids', .*: add the column label"
    ):
        sketch_dataset(model, dataset(), sketch, processing_class=Tokenizer())


def test_a_text_is_a_question(model, sketch):
    data = dataset(labels=SENTENCES)
    store = sketch_dataset(model, data, sketch, processing_class=Tokenizer())
    texts = Dataset.from_dict({"text": ["first", "second", "third"]})
    top = store.ask(model, Tokenizer(), "fgh", top_k=3, method="dot", dataset=texts)
    query = gradient_of(model, sketch, [5, 6, 7])
    rows = torch.stack([gradient_of(model, sketch, ids) for ids in SENTENCES])
    expected = rows @ query
    order = expected.argsort(descending=True).tolist()
    assert top["example_id"][:] == order
    assert top["text"][:] == [texts["text"][i] for i in order]
    assert top["score"][:] == pytest.approx(expected[order].tolist(), rel=1e-3)
    classifier = tiny_model("bert")
    with pytest.raises(ValueError, match=r"of a causal language model, got a Bert"):
        store.ask(classifier, Tokenizer(), "fgh")


def test_rows_that_are_not_sketched_are_named():
    store = rows_of(random_matrix(4, 0))
    for unsketched in (store.dataset, "why?"):
        with pytest.raises(TypeError, match=r"call sketch_dataset\(model, dataset, st"):
            store.attribute(unsketched)


def test_a_store_says_in_a_line_what_it_holds():
    store = rows_of(random_matrix(5, 0))
    assert repr(store) == "GradientRows(5 rows of 5 examples, D=4)"
    assert len(store) == 5
    assert store[103].dataset["example_id"][:] == [103]
    with pytest.raises(ValueError, match=r"\{'example_id': 7\}, got none: see"):
        store[7]


def test_a_notebook_shows_the_line_of_a_store_and_its_first_rows():
    rows = rows_of(random_matrix(7, 0), source=["<b>web</b>"] * 7)
    shown = rows._repr_html_()
    assert "<p>GradientRows(7 rows of 7 examples, D=4)</p>" in shown
    assert shown.count("&lt;b&gt;web") == 5
    assert "<b>" not in shown
    assert "sketch" not in shown
    assert ">104<" in shown
    assert ">105<" not in shown
