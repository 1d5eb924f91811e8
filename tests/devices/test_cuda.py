"""On a CUDA device: the CPU's numbers, undisturbed training, few waits for the host."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from hf_sketch import (
    AFFD,
    AFJL,
    FFD,
    FJL,
    QK,
    SRHT,
    Dense,
    ExampleSketcher,
    Grouped,
    HessianOperator,
    ModelSketch,
    SketchedHessian,
    lanczos,
    load_sketches,
)
from hf_sketch.attribution import shares
from hf_sketch.callbacks import GradientSketchCallback, HessianSpectrumCallback
from hf_sketch.callbacks.recording.run import Run
from hf_sketch.callbacks.recording.sink import RowSink
from hf_sketch.examples.modules import hooks
from hf_sketch.sketches.transforms.random import CounterRandom, ascending_order
from hf_sketch.sketches.transforms.signs import flip, sign_masks
from tests.helpers.noted_rows import NotedRows
from tests.helpers.operators.device_oracles import (
    WITHOUT_DROPOUT,
    assert_same_operator_on,
    random,
    subspace_steps,
)
from tests.helpers.rows_in_memory import rows_of
from tests.helpers.stores import HEADER, write_store
from tests.helpers.trained.training import tiny_batch, tiny_bert, tiny_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")
SIZE = 256
STEPS = 8
MIXES = ("hadamard", "fft", "kronecker")
OPERATORS = [
    *(kind(1000, 64, 2, mix=mix) for kind in (FJL, AFFD, AFJL) for mix in MIXES),
    *(AFFD(5000, 100, 4, 128, mix=mix) for mix in MIXES),
    *(AFJL(5000, 100, 4, 256, mix=mix) for mix in MIXES),
    *(SRHT(1000, 64, 2), SRHT(5000, 128, 4, 128), SRHT(2**20, 2**12, 3, 2**10)),
    *(AFFD(2**20, 2**10, 3, 2**10), FFD(1000, 60, 2), Dense(1000, 60, 2)),
    *(QK(1000, 60, 2), QK(2**12 + 1, 64, 3)),
    QK(60, 16, 0, in_factors=(10, 6), out_factors=(4, 4), rotation="signs"),
    Grouped(360, 64, 3, (60, 6), (32, 8)),
    Grouped(480, 60, 2, (4, 5, 24), (8, 16)),
]
each_operator = pytest.mark.parametrize("operator", OPERATORS, ids=repr)
ON_CUDA = {
    "use_cpu": False,
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
    "save_strategy": "no",
}


@each_operator
def test_operators_are_those_of_the_cpu(operator):
    assert_same_operator_on(CUDA, operator)


def test_random_words_have_the_bits_of_the_cpu():
    rng = CounterRandom(3, "a role")
    expected = rng.words(2**32 - 500, 1000)
    got = rng.words(2**32 - 500, 1000, CUDA)
    assert torch.equal(got.cpu(), expected)


def test_signs_and_orders_are_drawn_there_with_the_bits_of_the_cpu():
    rng = CounterRandom(3, "a role")
    got, expected = (sign_masks(rng, 7, 1000, place) for place in (CUDA, None))
    assert torch.equal(got.cpu(), expected)
    got, expected = (ascending_order(rng.words(0, 1000, at)) for at in (CUDA, None))
    assert torch.equal(got.cpu(), expected)
    got, expected = (rng.normals(7, 1000, place) for place in (CUDA, None))
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-6, atol=0)


def test_signs_are_flipped_bit_for_bit_as_on_the_cpu():
    masks = sign_masks(CounterRandom(3, "signs"), 7, 1000)
    x = random(2, 1000)
    x[0, :4] = torch.tensor([0.0, -0.0, torch.inf, 1e-30])
    expected, got = flip(x, masks), flip(x.cuda(), masks.cuda()).cpu()
    assert torch.equal(got.signbit(), expected.signbit())
    assert torch.equal(got, expected)


@pytest.mark.parametrize("layout", ["grouped", "blocked", "factored", "flat"])
def test_a_sketched_gradient_is_that_of_the_cpu(layout):
    shapes = (("table", (300, 64)), ("weight", (300, 260)), ("bias", (260,)))
    sketch = ModelSketch(shapes, 256, layout)
    gradients = {name: random(*shape) for name, shape in shapes}
    away = {name: x.cuda() for name, x in gradients.items()}
    got, expected = sketch.sketch(away).cpu(), sketch.sketch(gradients)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


class NoWaits(TrainerCallback):
    """From step 3 on, makes each wait for the device an error within our own code."""

    def __init__(self, monkeypatch):
        self.on, self.entered = False, 0
        entries = [(ExampleSketcher, "_start"), (ExampleSketcher, "_after")]
        entries += [(ExampleSketcher, "take"), (hooks, "_watch"), (hooks, "_add")]
        names = ("end_micro_batch", "end_gradient", "end_step")
        for owner, name in (*entries, *((Run, name) for name in names)):
            monkeypatch.setattr(owner, name, self._strict(getattr(owner, name)))

    def _strict(self, plain):
        @functools.wraps(plain)
        def strict(*args, **kwargs):
            if not self.on:
                return plain(*args, **kwargs)
            self.entered += 1
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            try:
                return plain(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return strict

    def on_step_begin(self, args, state, control, **kwargs):
        self.on = state.global_step >= 3


def train(directory, *callbacks, model=None, **arguments):
    model = tiny_bert(**WITHOUT_DROPOUT) if model is None else model
    settings = {**ON_CUDA, **arguments}
    trainer = tiny_trainer(directory, *callbacks, model=model, **settings)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def on_cuda(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cuda")
    trainer = train(directory, GradientSketchCallback(SIZE))
    assert trainer.args.device.type == "cuda"
    return load_sketches(directory)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cpu")
    train(directory, GradientSketchCallback(SIZE), use_cpu=True)
    return load_sketches(directory)


@pytest.mark.parametrize("kind", ["dataset", "steps"])
def test_the_rows_are_those_of_training_on_the_cpu(kind, on_cuda, on_cpu):
    got = getattr(on_cuda, kind).with_format("torch")[:]
    expected = getattr(on_cpu, kind).with_format("torch")[:]
    assert got.keys() == expected.keys()
    for name, column in expected.items():
        torch.testing.assert_close(got[name], column, rtol=1e-3, atol=1e-4)


def test_the_error_of_the_store_is_measured_there(on_cuda, on_cpu):
    got, expected = on_cuda.measured_error, on_cpu.measured_error
    assert got.examples == expected.examples
    assert got.relative_error == pytest.approx(expected.relative_error, rel=1e-2)
    assert got.row_error < 1e-4


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=str)
def test_training_is_bit_for_bit_what_it_is_without_the_callbacks(tmp_path, precision):
    def run(name, *callbacks):
        model = tiny_bert(attn_implementation="eager")
        trainer = train(tmp_path / name, *callbacks, model=model, **precision)
        losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        return losses, [p.detach().cpu() for p in trainer.model.parameters()]

    losses, weights = run("plain")
    hessian = HessianSpectrumCallback(
        steps=[2], batches=[tiny_batch(4)], krylov_dim=4, out_size=64
    )
    recorded = GradientSketchCallback(SIZE)
    recorded_losses, recorded_weights = run("recorded", recorded, hessian)
    assert recorded_losses == losses
    assert all(map(torch.equal, recorded_weights, weights))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_gives_the_rows_of_full_precision(tmp_path, precision, on_cuda):
    """Scaled losses too: the rows are those of the loss, whatever its scale."""
    train(tmp_path, GradientSketchCallback(SIZE), **{precision: True})
    store = load_sketches(tmp_path)
    first = [s.where(step=1).dataset.with_format("torch") for s in (store, on_cuda)]
    got, expected = (rows["sketch"][:] for rows in first)
    assert (got - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str
)
def test_recording_never_waits_for_the_device(tmp_path, monkeypatch, settings):
    watch = NoWaits(monkeypatch)
    train(tmp_path, GradientSketchCallback(SIZE), watch, **settings)
    assert watch.entered > 5 * (STEPS - 4)


def test_rows_that_are_held_leave_while_training_goes_on():
    written = NotedRows()
    sink = RowSink(written)
    expected = [
        {"step": torch.tensor([step]), "sketch": random(1, 2**23) + step}
        for step in range(3)
    ]
    for count, columns in enumerate(expected):
        sink.append("per_step", {**columns, "sketch": columns["sketch"].cuda()})
        sink.end_step()
        assert len(written.rows) == count  # each 32 MiB go when the next do
    sink.flush()
    for (_, got), columns in zip(written.rows, expected, strict=True):
        assert all(torch.equal(got[name], columns[name]) for name in columns)


def curvature(device):
    """A Hessian-vector product and sketched eigenvalues."""
    plain = tiny_bert(**WITHOUT_DROPOUT).eval().to(device)
    batch = {name: column.to(device) for name, column in tiny_batch(4).items()}
    hessian = HessianOperator(plain, [batch])
    generator = torch.Generator().manual_seed(0)
    product = hessian @ {
        name: torch.randn(parameter.shape, generator=generator).to(device)
        for name, parameter in hessian.parameters.items()
    }
    sketched = SketchedHessian(hessian, ModelSketch.from_model(plain, 64, "blocked"))
    values = lanczos(sketched, 64).eigenvalues
    return torch.cat([part.flatten() for part in product.values()]).cpu(), values.cpu()


def test_curvature_is_that_of_the_cpu():
    for got, expected in zip(curvature(CUDA), curvature("cpu"), strict=True):
        assert (got - expected).norm() <= 1e-3 * expected.norm()


def test_steps_in_a_subspace_are_those_of_the_cpu():
    results = [
        subspace_steps(tiny_bert(**WITHOUT_DROPOUT), device) for device in (CUDA, "cpu")
    ]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("row_dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("method", ["dot", "cosine", "tracin", "preconditioned"])
@pytest.mark.parametrize("groups", [None, "example_id"])
def test_scores_are_those_of_the_cpu(tmp_path, monkeypatch, row_dtype, method, groups):
    header = replace(HEADER, row_dtype=row_dtype)
    write_store(tmp_path / "sketches", range(1, 40), header=header)
    store = load_sketches(tmp_path)
    matrix = random(3, store.model_sketch.out_size).cpu()
    queries = rows_of(matrix, store.model_sketch)
    alone = SimpleNamespace(process_index=0, num_processes=1, device=CUDA)
    monkeypatch.setattr(shares, "processes", lambda: alone)
    asked = {"method": method, "groups": groups}
    expected = store.scores(queries, **asked)
    got = replace(store, split=True).scores(queries, **asked)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    found = store.over_processes().attribute(queries, 5, bottom_k=2, **asked)
    lines = store.attribute(queries, 5, bottom_k=2, **asked)
    assert found["score"][:] == pytest.approx(lines["score"][:], 1e-4, 1e-5)
