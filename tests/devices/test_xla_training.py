"""Training on XLA's own CPU device: the CPU's rows, few programs and few reads."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from transformers import TrainerCallback

from hf_sketch import HessianOperator, load_sketches
from hf_sketch.callbacks import GradientSketchCallback
from hf_sketch.callbacks.recording.sink import RowSink
from tests.helpers.noted_rows import NotedRows
from tests.helpers.operators.device_oracles import WITHOUT_DROPOUT, subspace_steps
from tests.helpers.trained.training import tiny_batch, tiny_bert, tiny_trainer

torch_xla = pytest.importorskip("torch_xla")
metrics = pytest.importorskip("torch_xla.debug.metrics")

pytestmark = [
    pytest.mark.xla,
    # accelerate calls torch_xla by names that it deprecates, PEFT transformers.
    pytest.mark.filterwarnings("default"),
]

SIZE = 256
STEPS = 8


def model():
    return tiny_bert(**WITHOUT_DROPOUT)


class Counts(TrainerCallback):
    """Notes what torch_xla has compiled and read by the end of each step."""

    def __init__(self):
        self.programs, self.reads = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.programs.append(programs())
        self.reads.append(reads())


def programs():
    return (metrics.metric_data("CompileTime") or (0,))[0]


def reads():
    return (metrics.metric_data("TransferFromDeviceTime") or (0,))[0]


SETTINGS = {
    "optim": "adamw_torch",  # the fused default does not run on XLA
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
    "dataloader_drop_last": True,
    "logging_strategy": "no",
    "save_strategy": "no",
    "use_cpu": False,
}
ON_CPU = """
import sys
sys.modules["torch_xla"] = None  # accelerate takes its device wherever it is found
from hf_sketch.callbacks import GradientSketchCallback
from tests.helpers.trained.training import tiny_bert, tiny_trainer
model = tiny_bert(**{model})
callback = GradientSketchCallback({size})
trainer = tiny_trainer({directory!r}, callback, model=model, **{settings})
trainer.train()
assert trainer.args.device.type == "cpu"
"""


def train(directory, *callbacks, **arguments):
    counts = Counts()
    settings = {**SETTINGS, **arguments}
    trainer = tiny_trainer(directory, *callbacks, counts, model=model(), **settings)
    trainer.train()
    return trainer, counts


def differences(numbers):
    return [after - before for before, after in pairwise(numbers)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def steps_only(tmp_path_factory):
    directory = tmp_path_factory.mktemp("steps")
    return directory, *train(directory, GradientSketchCallback(SIZE, per_example=False))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    directory = tmp_path_factory.mktemp("rows")
    return directory, *train(directory, GradientSketchCallback(SIZE))


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("cpu"))
    script = ON_CPU.format(
        model=WITHOUT_DROPOUT,
        size=SIZE,
        directory=directory,
        settings={**SETTINGS, "use_cpu": True},
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    return load_sketches(directory)


def assert_same_columns(got, expected):
    got, expected = got.with_format("torch")[:], expected.with_format("torch")[:]
    assert got.keys() == expected.keys()
    for name, column in expected.items():
        torch.testing.assert_close(got[name], column, rtol=1e-4, atol=1e-5)


def test_the_trainer_trains_on_xla(everything):
    assert everything[1].args.device.type == "xla"


def test_the_rows_of_examples_are_those_of_training_on_the_cpu(everything, on_cpu):
    store = load_sketches(everything[0])
    assert len(store.dataset) == 4 * STEPS
    assert_same_columns(store.dataset, on_cpu.dataset)


def test_the_rows_of_steps_are_those_of_training_on_the_cpu(everything, on_cpu):
    store = load_sketches(everything[0])
    assert len(store.steps) == STEPS
    assert (store.steps.with_format("torch")["clip_factor"][:] < 1).any()
    assert_same_columns(store.steps, on_cpu.steps)


@pytest.mark.parametrize("run", ["plain", "steps_only", "everything"])
def test_nothing_is_compiled_after_the_third_step(run, request):
    counts = request.getfixturevalue(run)[-1]
    assert differences(counts.programs)[2:] == [0] * (STEPS - 3)


def test_recording_steps_reads_nothing_that_training_does_not(plain, steps_only):
    assert differences(steps_only[-1].reads) == differences(plain[-1].reads)


def test_recording_examples_reads_two_losses_a_batch_and_nothing_else(
    plain, everything
):
    """They tell which of the losses that fit the model's labels it computed."""
    expected = [reads + 2 for reads in differences(plain[-1].reads)]
    assert differences(everything[-1].reads) == expected


def test_all_rows_that_are_held_come_to_the_cpu_in_one_read():
    written = NotedRows()
    sink = RowSink(written)
    expected = [
        {
            "step": torch.tensor([step]),
            "loss": torch.tensor([step / 3]),
            "finite": torch.tensor([step > 1]),
            "sketch": torch.arange(4.0).view(1, 4) + step,
        }
        for step in range(3)
    ]
    for columns in expected:
        away = {n: c if n == "step" else c.to("xla") for n, c in columns.items()}
        sink.append("per_step", away)
        sink.end_step()
    assert written.rows == []
    torch_xla.sync()
    before = reads()
    sink.flush()
    assert reads() == before + 1
    assert [kind for kind, _ in written.rows] == ["per_step"] * 3
    for (_, got), columns in zip(written.rows, expected, strict=True):
        assert got.keys() == columns.keys()
        for name, column in columns.items():
            torch.testing.assert_close(got[name], column)


def test_rows_that_are_not_finite_are_reported_when_they_are_read(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                with torch.no_grad():
                    model.classifier.bias.fill_(float("nan"))

    with pytest.warns(UserWarning, match=r"of examples \[.*\] are NaN .* at step 2\."):
        train(tmp_path, GradientSketchCallback(SIZE), Poison(), max_steps=2)
    store = load_sketches(tmp_path)
    rows = store.dataset.with_format("torch")[:]
    assert rows["finite"].tolist() == [True] * 4 + [False] * 4


def test_steps_in_a_subspace_are_those_of_the_cpu_and_compile_three_times_at_most():
    counts = []

    def after_step():
        torch_xla.sync()
        counts.append(programs())

    results = subspace_steps(model(), torch_xla.device(), after_step)
    losses, omega = subspace_steps(model(), torch.device("cpu"))
    torch.testing.assert_close(results[0], losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[1], omega, rtol=1e-4, atol=1e-6)
    assert differences(counts)[2:] == [0, 0]


def test_a_hessian_vector_product_is_that_of_the_cpu():
    plain, device = model().eval(), torch_xla.device()
    generator = torch.Generator().manual_seed(0)
    vector = {
        name: torch.randn(parameter.shape, generator=generator)
        for name, parameter in plain.named_parameters()
    }
    expected = HessianOperator(plain, [tiny_batch(4)], self_check=False) @ vector
    moved = {name: column.to(device) for name, column in tiny_batch(4).items()}
    hessian = HessianOperator(model().eval().to(device), [moved], self_check=False)
    got = hessian @ {name: part.to(device) for name, part in vector.items()}
    torch_xla.sync()
    for name, part in expected.items():
        torch.testing.assert_close(got[name].cpu(), part, rtol=1e-4, atol=1e-5)
