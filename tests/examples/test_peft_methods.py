"""Methods of PEFT that train parameters of their own, beside single-example passes."""

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch.nn.functional import cross_entropy

from hf_sketch import ModelSketch
from hf_sketch.examples.sketcher import ExampleSketcher
from tests.helpers.peft_methods import (
    FULL,
    METHODS,
    OWN_LOSSES,
    PLAIN,
    RANDOM,
    VARIANTS,
    moved,
    tuned,
)
from tests.helpers.tiers import full

SIZE = 32


def batch(name):
    ids = torch.randint(1, 61, (3, 7))
    ids[1, 2], ids[2, 1] = 3, 5  # and none of the tokens that train in the first
    ids[0, ids[0] < 8] += 8
    labels = ids.clone()
    labels[0, :4] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "activated":  # from its tokens on, which all must have
        ids[:, :2] = torch.tensor([9, 10])
        ids[2, :4] = torch.tensor([11, 12, 9, 10])
    if name in ("multitask", "poly"):
        inputs["task_ids"] = torch.tensor([0, 1, 0])
    return {**inputs, "labels": labels}


def gradients_of(loss, parameters):
    tensors = list(parameters.values())
    settings = {"allow_unused": True, "materialize_grads": True}
    got = torch.autograd.grad(loss, tensors, retain_graph=True, **settings)
    return dict(zip(parameters, got, strict=True))


def recorded(model, inputs):
    """The rows of a batch, whose weighted sum is the gradient of its loss."""
    sketch = ModelSketch.from_model(model, SIZE, "grouped")
    with ExampleSketcher(model, sketch) as sketcher:
        model(**inputs).loss.backward()
        got = sketcher.take()
    parameters = sketch.parameters_of(model)
    whole = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    assert_near(got.weights.to(got.rows) @ got.rows, sketch.sketch(whole))
    return got, sketch, parameters


def assert_rows_are_own(model, inputs):
    got, sketch, parameters = recorded(model, inputs)
    assert got.complete
    for index in range(3):
        alone = {key: value[index : index + 1] for key, value in inputs.items()}
        loss = model(**alone).loss
        torch.testing.assert_close(got.losses[index], loss.detach())
        assert_near(got.rows[index], sketch.sketch(gradients_of(loss, parameters)))


def assert_near(row, wanted):
    assert (row - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.filterwarnings("ignore")  # of PEFT
@pytest.mark.parametrize("name", [*PLAIN, *full(*FULL)])
def test_rows_are_those_of_single_examples(name):
    assert_rows_are_own(tuned(METHODS[name]()), batch(name))


@pytest.mark.filterwarnings("ignore")  # of PEFT
@pytest.mark.parametrize("name", full(*VARIANTS))
@pytest.mark.parametrize("fresh", [False, True], ids=["trained", "fresh"])
def test_rows_are_own_however_lora_begins_and_wherever_it_is_put(name, fresh):
    model = VARIANTS[name]()
    assert_rows_are_own(model.train() if fresh else moved(model), batch(name))


@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_all_methods_of_peft_are_tried():
    tried = {make().peft_type for make in METHODS.values()}
    assert {*PEFT_TYPE_TO_CONFIG_MAPPING} - tried <= {"SUBSPACE"}  # ours


@pytest.mark.filterwarnings("ignore")  # of PEFT
@pytest.mark.parametrize("name", full(*RANDOM))
@pytest.mark.parametrize("fresh", [False, True], ids=["trained", "fresh"])
def test_rows_have_the_random_numbers_of_their_batch(name, fresh):
    model, inputs = tuned(METHODS[name](), fresh), batch(name)
    state = torch.get_rng_state()
    got, sketch, parameters = recorded(model, inputs)
    torch.set_rng_state(state)
    logits = model(**inputs).logits
    for index in range(3):
        loss = cross_entropy(logits[index, :-1], inputs["labels"][index, 1:])
        wanted = sketch.sketch(gradients_of(loss, parameters))
        assert_near(got.rows[index], wanted)


@pytest.mark.filterwarnings("ignore")  # of PEFT
@pytest.mark.parametrize("name", full(*OWN_LOSSES))
def test_rows_of_losses_that_a_method_adds_to_are_shares(name):
    model, inputs = tuned(METHODS[name]()), batch(name)
    got, sketch, parameters = recorded(model, inputs)
    assert got.losses.isnan().all()
    for index in range(3):
        alone = {key: value[index : index + 1] for key, value in inputs.items()}
        wanted = sketch.sketch(gradients_of(model(**alone).loss, parameters))
        assert torch.cosine_similarity(got.rows[index], wanted, dim=0) > 1 - 1e-5


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_a_router_that_averages_over_the_batch_is_refused():
    model = tuned(METHODS["lily"](), fresh=True)
    with pytest.raises(ValueError, match="other outputs without its batch-mates"):
        recorded(model, batch("lily"))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_random_numbers_from_a_list_that_runs_out_are_refused():
    model = tuned(METHODS["monteclora"]())
    with pytest.raises(RuntimeError, match="the same outputs when it is run again"):
        recorded(model, batch("monteclora"))


@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_the_penalty_of_adalora_belongs_to_no_example():
    model, inputs = tuned(METHODS["adalora"]()), batch("adalora")
    inputs["num_items_in_batch"] = torch.tensor(30)  # as the Trainer gives
    sketch = ModelSketch.from_model(model, SIZE, "grouped")
    with ExampleSketcher(model, sketch) as sketcher:
        model(**inputs).loss.backward()
        got = sketcher.take()
    assert not got.complete
    counts = (inputs["labels"][:, 1:] != -100).sum(1)
    torch.testing.assert_close(got.weights, counts / 30)
    logits, parameters = model(**inputs).logits, sketch.parameters_of(model)
    for index in range(3):
        own = cross_entropy(logits[index, :-1], inputs["labels"][index, 1:])
        torch.testing.assert_close(got.losses[index], own.detach())
        assert_near(got.rows[index], sketch.sketch(gradients_of(own, parameters)))
