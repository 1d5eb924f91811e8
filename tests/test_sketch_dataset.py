import pytest
import torch
from datasets import Dataset

from hf_sketch import ModelSketch, PerExampleSketcher, sketch_dataset
from tests.conftest import tiny_batch, tiny_bert, tiny_dataset


@pytest.fixture
def model():
    return tiny_bert()


@pytest.fixture
def sketch(model):
    return ModelSketch.from_model(model, 256, "factored")


def test_rows_are_those_of_the_sketcher_in_eval_mode(model, sketch):
    data = tiny_dataset(5)
    got = sketch_dataset(model.train(), data, sketch, batch_size=2)
    assert got.dataset["example_id"][:] == [0, 1, 2, 3, 4]
    assert got.model_sketch == sketch
    batch = {n: torch.tensor(data[n][:]) for n in ("input_ids", "attention_mask")}
    batch["labels"] = torch.tensor(data["label"][:])
    with PerExampleSketcher(model.eval(), sketch) as sketcher:
        expected = sketcher.sketch(batch)
    rows = got.dataset.with_format("torch")[:]
    torch.testing.assert_close(rows["sketch"], expected.rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows["loss"], expected.losses)
    torch.testing.assert_close(rows["gradient_norm"], rows["sketch"].norm(dim=1))


@pytest.mark.usefixtures("no_generator_use")
def test_the_model_is_left_as_it_was(model, sketch):
    model.train()
    model.bert.encoder.eval()
    modes = [module.training for module in model.modules()]
    sketch_dataset(model, tiny_dataset(3), sketch)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_rows_of_different_lengths_are_padded_by_the_tokenizer(model, sketch):
    class Tokenizer:
        def pad(self, examples, return_tensors):
            assert return_tensors == "pt"
            longest = max(len(example["input_ids"]) for example in examples)
            return {
                name: torch.tensor(
                    [
                        e[name] + [0] * (longest - len(e[name]))
                        if isinstance(e[name], list)
                        else e[name]
                        for e in examples
                    ]
                )
                for name in examples[0]
            }

    whole = tiny_batch(4)
    lengths = whole["attention_mask"].sum(1).tolist()
    ragged = Dataset.from_dict(
        {
            "input_ids": [
                row[:n]
                for row, n in zip(whole["input_ids"].tolist(), lengths, strict=True)
            ],
            "attention_mask": [[1] * n for n in lengths],
            "label": whole["labels"].tolist(),
        }
    )
    got = sketch_dataset(model, ragged, sketch, processing_class=Tokenizer())
    with PerExampleSketcher(model.eval(), sketch) as sketcher:
        expected = sketcher.sketch(whole).rows
    rows = got.dataset.with_format("torch")["sketch"][:]
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


def test_an_empty_dataset_has_no_rows(model, sketch):
    got = sketch_dataset(model, tiny_dataset(3).select([]), sketch)
    assert len(got.dataset) == 0


def test_a_sketch_of_another_model_is_named(sketch):
    other = tiny_bert(num_labels=2)
    with pytest.raises(ValueError, match=r"'classifier.weight' with shape \(3, 32\)"):
        sketch_dataset(other, tiny_dataset(3), sketch)


def test_another_set_of_trainable_parameters_is_named(model, sketch):
    model.classifier.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="the same parameters trainable"):
        sketch_dataset(model, tiny_dataset(3), sketch)
