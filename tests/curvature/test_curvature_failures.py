"""Too little memory, and arguments that cannot be right."""

import pytest
import torch

from hf_sketch import (
    EmpiricalFisherOperator,
    GaussNewtonOperator,
    HessianOperator,
    ModelSketch,
    SketchedHessian,
    hessian_spectrum,
    hessian_vector_product,
)
from tests.helpers.curvature_oracles import (
    AUTOGRAD,
    FINITE,
    Head,
    direction,
    exact,
    flat,
    head_batch,
    relative,
)
from tests.helpers.tiers import full
from tests.helpers.trained.tiny_models import tiny_inputs, tiny_model

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    RuntimeError("CUDA error: out of memory"),
    MemoryError(),
]


def short_of_memory(model, rows, place, error=ERRORS[0]):
    """Let passes of a model fail with more rows; return the sizes of the batches."""
    sizes = []

    def forward(module, args, kwargs):
        size = len(next(iter(kwargs.values())))
        sizes.append(size)
        if size > rows and place == "forward":
            raise error

    def backward(module, args, kwargs, output):
        logits = output["logits"]
        if logits.requires_grad and len(logits) > rows and place == "backward":
            logits.register_hook(fail)

    def fail(gradient):
        raise error

    model.register_forward_pre_hook(forward, with_kwargs=True)
    model.register_forward_hook(backward, with_kwargs=True)
    return sizes


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize(
    ("mode", "form"),
    [
        (AUTOGRAD, "product"),
        (FINITE, "sketched"),  # streamed
        *full((FINITE, "product"), (AUTOGRAD, "sketched"), (AUTOGRAD, "gradient")),
    ],
)
def test_a_batch_that_does_not_fit_is_halved_with_the_same_result(mode, form, place):
    model = tiny_model("bert")
    batches = [{k: v[:2] for k, v in tiny_inputs("bert").items()}, tiny_inputs("bert")]
    sketch, vector = ModelSketch.from_model(model, 32), direction(model)

    def result(operator):
        if form == "product":
            return flat(operator @ vector)
        if form == "sketched":
            return operator.sketched_product(sketch, torch.ones(32).double())
        return operator.loss_and_sketched_gradient(sketch)[1]

    wanted = result(HessianOperator(model, batches, mode=mode))
    sizes = short_of_memory(model, 2, place)
    operator = HessianOperator(model, batches, mode=mode)
    assert relative(result(operator), wanted) < 1e-9
    sizes.clear()
    operator.gradient()
    assert sizes == [2, 2, 2]  # the halves are kept


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_all_ways_to_run_out_of_memory_are_known(error):
    model = Head()
    wanted = flat(HessianOperator(model, [head_batch()]) @ direction(model))
    short_of_memory(model, 4, "backward", error)
    got = flat(HessianOperator(model, [head_batch()]) @ direction(model))
    assert relative(got, wanted) < 1e-9


@pytest.mark.parametrize("operator", [GaussNewtonOperator, EmpiricalFisherOperator])
@pytest.mark.parametrize("place", ["backward", *full("forward")])
def test_the_relatives_of_the_hessian_halve_batches_too(operator, place):
    model = Head()
    wanted = flat(operator(model, [head_batch()]) @ direction(model))
    short_of_memory(model, 2, place)
    got = flat(operator(model, [head_batch()]) @ direction(model))
    assert relative(got, wanted) < 1e-9


def test_halves_without_labels_count_for_nothing():
    model, batch = tiny_model("gpt2"), tiny_inputs("gpt2")
    batch["labels"][2:, 1:] = -100
    for unit in ("tokens", "examples"):
        plain = HessianOperator(model, [batch], unit=unit) @ direction(model)
        first = {k: v[:2] for k, v in batch.items()}
        wanted = HessianOperator(model, [first], unit=unit) @ direction(model)
        assert relative(flat(plain), flat(wanted)) < 1e-6
    short_of_memory(model, 2, "backward")
    got = HessianOperator(model, [batch]) @ direction(model)
    wanted = HessianOperator(model, [first]) @ direction(model)
    assert relative(flat(got), flat(wanted)) < 1e-6


@pytest.mark.parametrize(
    ("mode", "place"),
    [
        (AUTOGRAD, "forward"),
        (FINITE, "backward"),
        *full((AUTOGRAD, "backward"), (FINITE, "forward")),
    ],
)
def test_an_example_that_does_not_fit_alone_is_named(mode, place):
    model = Head()
    theta = flat({n: p.detach().clone() for n, p in model.named_parameters()})
    short_of_memory(model, 0, place)
    operator = HessianOperator(model, [head_batch()], mode=mode)
    message = r'that cannot be split further\. Pass shorter examples, or mode="finite_d'
    with pytest.raises(MemoryError, match=message):
        operator @ direction(model)
    sketch = ModelSketch.from_model(model, 16)
    with pytest.raises(MemoryError, match=message):
        operator.sketched_product(sketch, torch.ones(16).double())
    assert torch.equal(flat(dict(model.named_parameters())), theta)


def test_errors_that_are_not_of_memory_pass_through():
    model = Head()
    short_of_memory(model, 2, "forward", RuntimeError("a device-side assert"))
    with pytest.raises(RuntimeError, match="a device-side assert"):
        HessianOperator(model, [head_batch()]) @ direction(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "hvp"}, r"mode must be one of 'auto', .*, got 'hvp'"),
        ({"unit": "words"}, r"unit must be one of 'tokens', .*, got 'words'"),
    ],
)
def test_unknown_choices_are_refused(options, message):
    for operator in (HessianOperator, GaussNewtonOperator, EmpiricalFisherOperator):
        with pytest.raises(ValueError, match=message):
            operator(Head(), [head_batch()], **options)
    with pytest.raises(ValueError, match=message):
        hessian_vector_product(Head(), [head_batch()], direction(Head()), **options)


def test_an_empty_list_of_batches_is_refused():
    with pytest.raises(ValueError, match=r"one batch, got an empty list\. Pass"):
        HessianOperator(Head(), [])


def test_models_that_do_not_train_are_refused():
    with pytest.raises(ValueError, match=r"one trainable parameter, got none\. Call"):
        HessianOperator(Head().requires_grad_(False), [head_batch()])


def test_batches_without_any_label_are_refused():
    model, batch = tiny_model("gpt2"), tiny_inputs("gpt2")
    batch["labels"][:] = -100
    for loss_fn in (None, lambda output, inputs: output.loss):
        with pytest.raises(ValueError, match=r"all labels are -100\. Pass other"):
            HessianOperator(model, [batch], loss_fn) @ direction(model)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (
            lambda o, _: o["logits"],
            r"one number, got \(6, 3\)\. Return the batch's mean",
        ),
        (lambda o, _: o["loss"] * torch.nan, "a finite loss, got nan. Look for the"),
        (lambda o, _: o["loss"] / 0, "a finite loss, got inf"),
    ],
)
def test_losses_that_are_no_finite_number_are_refused(loss_fn, message):
    operator = HessianOperator(Head(), [head_batch()], loss_fn)
    with pytest.raises(ValueError, match=message):
        operator @ direction(Head())


def test_a_loss_that_becomes_nan_later_is_an_error():
    model = Head()
    operator = HessianOperator(model, [head_batch()])
    operator @ direction(model)
    with torch.no_grad():
        model.first.bias[0] = torch.nan
    with pytest.raises(ValueError, match="a finite loss, got nan"):
        operator @ direction(model)


def test_a_loss_of_one_element_counts_as_a_number():
    model = Head()
    wanted = HessianOperator(model, [head_batch()]) @ direction(model)
    operator = HessianOperator(model, [head_batch()], lambda o, _: o["loss"][None])
    assert relative(flat(operator @ direction(model)), flat(wanted)) < 1e-12


def test_losses_that_cannot_be_split_into_tokens_are_refused_with_the_way_out():
    class Odd(Head):
        def forward(self, x, labels):
            output = super().forward(x, labels)
            return {**output, "loss": output["loss"] + self.last.weight.square().sum()}

    model, batch = Odd(), head_batch()
    message = r"must be a mean over tokens.*Or pass loss_fn=lambda output, inputs"
    with pytest.raises(ValueError, match=message):
        HessianOperator(model, [batch]) @ direction(model)
    operator = HessianOperator(model, [batch], lambda o, _: o["loss"])
    got = flat(operator @ direction(model))
    assert relative(got, exact(model, [batch], direction(model))) < 1e-12


def test_vectors_of_another_model_are_refused():
    operator = HessianOperator(Head(), [head_batch()])
    vector = direction(Head())
    vector["first.weight"] = vector["first.weight"].T
    with pytest.raises(ValueError, match=r"shape \(5, 4\), got \(4, 5\)\. Pass a part"):
        operator @ vector
    del vector["first.weight"]
    with pytest.raises(
        ValueError, match=r"have 'first.weight' .*got None. Pass a part"
    ):
        operator @ vector


def test_sketches_of_another_model_are_refused():
    sketch = ModelSketch.from_model(tiny_model("gpt2"), 16)
    with pytest.raises(ValueError, match="pass the model that the sketch was made for"):
        SketchedHessian(HessianOperator(Head(), [head_batch()]), sketch)


@pytest.mark.parametrize("krylov_dim", [0, 17])
def test_more_steps_than_the_sketch_has_numbers_are_refused(krylov_dim):
    model = Head()
    sketch = ModelSketch.from_model(model, 16)
    operator = SketchedHessian(HessianOperator(model, [head_batch()]), sketch)
    with pytest.raises(ValueError, match=rf"in \[1, 16\].*got {krylov_dim}"):
        hessian_spectrum(operator, krylov_dim, progress=False)
    with pytest.raises(ValueError, match="keep_vectors must be an integer of"):
        hessian_spectrum(operator, 4, keep_vectors=-1, progress=False)


def test_gauss_newton_needs_a_loss_of_the_logits():
    model = Head()
    weight = model.last.weight
    operator = GaussNewtonOperator(
        model, [head_batch()], lambda o, _: weight.square().sum()
    )
    with pytest.raises(ValueError, match=r"a loss of the output's logits.*HessianOper"):
        operator @ direction(model)
    linear = GaussNewtonOperator(model, [head_batch()], lambda o, _: o["logits"].mean())
    assert not flat(linear @ direction(model)).any()
