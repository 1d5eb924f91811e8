"""What an error leaves behind in the sketcher: nothing."""

import pytest
import torch

from hf_sketch import ExampleSketcher, ModelSketch
from tests.helpers.trained.training import tiny_batch, tiny_bert


@pytest.fixture
def sketcher():
    model = tiny_bert().eval()
    with ExampleSketcher(model, ModelSketch.from_model(model, 64)) as sketcher:
        sketcher.sketch(tiny_batch())  # learns how the model is read
        yield sketcher


def raising(error):
    def hook(*_):
        raise error

    return hook


def assert_next_batch_is_right(sketcher):
    expected = sketcher.sketch(tiny_batch())
    sketcher.model(**tiny_batch()).loss.backward()
    got = sketcher.take()
    torch.testing.assert_close(got.rows, expected.rows)
    torch.testing.assert_close(got.losses, expected.losses)


ERRORS = pytest.mark.parametrize("error", [RuntimeError("ours"), KeyboardInterrupt()])


@ERRORS
def test_an_error_in_the_forward_pass_does_not_spoil_the_next_batch(sketcher, error):
    handle = sketcher.model.classifier.register_forward_hook(raising(error))
    with pytest.raises(type(error)):
        sketcher.model(**tiny_batch())
    handle.remove()
    assert_next_batch_is_right(sketcher)


@ERRORS
def test_an_error_in_the_backward_pass_does_not_spoil_the_next_batch(sketcher, error):
    pooler = sketcher.model.bert.pooler.dense
    handle = pooler.register_full_backward_hook(raising(error))
    loss = sketcher.model(**tiny_batch()).loss
    with pytest.raises(type(error)):
        loss.backward()
    handle.remove()
    assert_next_batch_is_right(sketcher)


def test_no_rows_are_taken_of_a_backward_pass_that_failed(sketcher):
    pooler = sketcher.model.bert.pooler.dense
    pooler.register_full_backward_hook(raising(RuntimeError("ours")))
    with pytest.raises(RuntimeError, match="ours"):
        sketcher.model(**tiny_batch()).loss.backward()
    with pytest.raises(RuntimeError, match="a forward and a backward pass must come"):
        sketcher.take()


def test_a_loss_that_is_refused_does_not_spoil_the_next_batch(sketcher):
    model, plain = sketcher.model, sketcher.model.forward

    def compared(**inputs):
        output = plain(**inputs)
        output["loss"] = output["logits"].mean(0).square().sum()
        return output

    model.forward = compared
    with pytest.raises(ValueError, match="computes one that compares them"):
        model(**tiny_batch())
    model.forward = plain
    assert_next_batch_is_right(sketcher)


def test_an_error_in_sketch_does_not_spoil_the_next_batch(sketcher):
    with pytest.raises(KeyError, match="ours"):
        sketcher.sketch(tiny_batch(), loss_fn=raising(KeyError("ours")))
    assert_next_batch_is_right(sketcher)


def test_rows_that_are_not_taken_are_an_error_of_the_next_batch(sketcher):
    sketcher.model(**tiny_batch()).loss.backward()
    with pytest.raises(RuntimeError, match=r"before one backward pass, .*per_example"):
        sketcher.model(**tiny_batch())
    assert_next_batch_is_right(sketcher)


def test_a_model_that_calls_itself_is_refused(sketcher):
    model, plain = sketcher.model, sketcher.model.forward

    def forward(**inputs):
        model.forward = plain
        model(**inputs)
        return plain(**inputs)

    model.forward = forward
    with pytest.raises(RuntimeError, match=r"before one backward pass, .*per_example"):
        model(**tiny_batch())
    assert_next_batch_is_right(sketcher)
