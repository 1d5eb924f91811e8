import peft
import pytest
import torch
from datasets import Dataset

from hf_sketch import ExampleSketcher, ModelSketch, sketch_dataset
from tests.helpers.trained.tiny_models import tiny_inputs, tiny_model
from tests.helpers.trained.training import tiny_batch, tiny_bert, tiny_dataset


@pytest.fixture
def model():
    return tiny_bert()


@pytest.fixture
def sketch(model):
    return ModelSketch.from_model(model, 256, "grouped")


def test_rows_are_those_of_the_sketcher_in_eval_mode(model, sketch):
    data = tiny_dataset(5)
    got = sketch_dataset(model.train(), data, sketch, batch_size=2)
    assert got.dataset["example_id"][:] == [0, 1, 2, 3, 4]
    assert got.model_sketch == sketch
    batch = {n: torch.tensor(data[n][:]) for n in ("input_ids", "attention_mask")}
    batch["labels"] = torch.tensor(data["label"][:])
    with ExampleSketcher(model.eval(), sketch) as sketcher:
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
    with ExampleSketcher(model.eval(), sketch) as sketcher:
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


@pytest.fixture
def language_model():
    return tiny_model("llama").eval()


def single_gradients(model, batch, loss_of):
    """Each example's gradients of `loss_of(output, batch)`, from a pass of its own."""
    for index in range(len(batch["input_ids"])):
        alone = {name: column[index : index + 1] for name, column in batch.items()}
        model.zero_grad()
        loss_of(model(**alone), alone).backward()
        yield {name: p.grad.clone() for name, p in model.named_parameters()}


def sketched(model, sketch, **options):
    columns = {n: column.tolist() for n, column in tiny_inputs("llama").items()}
    got = sketch_dataset(model, Dataset.from_dict(columns), sketch, **options)
    return got.dataset.with_format("torch")[:]


def assert_rows_are(rows, sketch, gradients):
    for row, wanted in zip(rows["sketch"], gradients, strict=True):
        expected = sketch.sketch(wanted).float()
        assert (row - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_is_a_mean_or_a_sum_over_tokens(language_model, reduction):
    sketch = ModelSketch.from_model(language_model, 256, "grouped")
    rows = sketched(language_model, sketch, loss=reduction)

    def own(output, batch):
        tokens = (batch["labels"][:, 1:] != -100).sum()
        return output.loss * (tokens if reduction == "sum" else 1)

    assert_rows_are(
        rows, sketch, single_gradients(language_model, tiny_inputs("llama"), own)
    )


def test_a_target_of_ones_own(language_model):
    sketch = ModelSketch.from_model(language_model, 256, "grouped")

    def margin(output, batch):
        last = output.logits[:, -1]
        return last[:, 5] - last[:, 7]

    rows = sketched(language_model, sketch, loss_fn=margin, batch_size=3)
    gradients = single_gradients(
        language_model, tiny_inputs("llama"), lambda *given: margin(*given).sum()
    )
    assert_rows_are(rows, sketch, gradients)
    with torch.no_grad():
        output = language_model(**tiny_inputs("llama"))
    torch.testing.assert_close(rows["loss"], margin(output, None).float())


def test_a_target_that_compares_examples_is_refused(language_model):
    sketch = ModelSketch.from_model(language_model, 256, "grouped")

    def contrast(output, batch):
        last = output.logits[:, -1, 5]
        return last * last.mean()

    with pytest.raises(RuntimeError, match="the gradient of its example alone within"):
        sketched(language_model, sketch, loss_fn=contrast)


def test_an_unknown_reduction_is_named(model, sketch):
    with pytest.raises(ValueError, match=r"loss must be one of .*, got 'max'"):
        sketch_dataset(model, tiny_dataset(2), sketch, loss="max")


def test_an_adapter_that_was_loaded_frozen_is_explained(tmp_path):
    def config():
        return peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")

    tuned = peft.get_peft_model(tiny_bert(), config())
    tuned.save_pretrained(tmp_path)
    sketch = ModelSketch.from_model(tuned, 64)
    frozen = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path)
    with pytest.raises(
        ValueError, match=r"no trainable parameter.*is_trainable=True\)"
    ):
        sketch_dataset(frozen, tiny_dataset(2), sketch)
    with pytest.raises(ValueError, match=r"got none.*is_trainable=True\)"):
        ModelSketch.from_model(frozen, 64)
    trained = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path, is_trainable=True)
    assert len(sketch_dataset(trained, tiny_dataset(2), sketch)) == 2
