import pytest
import torch

from hf_sketch.callbacks import held_rows
from hf_sketch.callbacks.recording.sink import HeldRows


class Away(torch.Tensor):
    """Says that it is not on the CPU."""

    is_cpu = False
    __torch_function__ = torch._C._disabled_torch_function_impl  # for it alone


@pytest.fixture
def handed():
    return []


@pytest.fixture
def rows(handed):
    return HeldRows(lambda kind, columns: handed.append((kind, columns)))


def columns(step):
    return {
        "step": torch.tensor([step]),
        "finite": torch.tensor([step % 2 == 0]),
        "loss": torch.tensor([step / 3], dtype=torch.float64),
        "sketch": torch.arange(4.0).view(1, 4) + step,
    }


def append(rows, step):
    here = columns(step)
    away = {name: x.as_subclass(Away) for name, x in here.items() if name != "step"}
    rows.append(f"kind {step}", {"step": here["step"], **away})
    rows.end_step()


def assert_handed(handed, steps):
    assert [kind for kind, _ in handed] == [f"kind {step}" for step in steps]
    for (_, got), step in zip(handed, steps, strict=True):
        for name, column in columns(step).items():
            assert got[name].is_cpu
            assert got[name].dtype == column.dtype
            assert torch.equal(got[name], column)


def test_rows_on_the_cpu_are_handed_on_at_once(rows, handed):
    rows.append("kind 3", columns(3))
    assert_handed(handed, [3])


def test_rows_that_are_away_come_in_order_when_the_next_leave(
    rows, handed, monkeypatch
):
    monkeypatch.setattr(held_rows, "_MOST_PARTS", 2)
    counts = []
    for step in range(5):
        append(rows, step)
        counts.append(len(handed))
    assert counts == [0, 0, 0, 2, 2]
    rows.flush()
    assert_handed(handed, range(5))
    rows.flush()
    assert len(handed) == 5


def test_many_bytes_leave_too(rows, handed, monkeypatch):
    monkeypatch.setattr(held_rows, "_MOST_BYTES", 30)  # 25 a step
    for step in range(4):
        append(rows, step)
    assert_handed(handed, [0, 1])
