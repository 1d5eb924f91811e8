"""How rows leave the device that trains."""

import pytest
import torch

from hf_sketch.callbacks.recording import sink as sink_module
from hf_sketch.callbacks.recording.sink import RowSink
from tests.helpers.noted_rows import NotedRows


class Away(torch.Tensor):
    """Says that it is not on the CPU."""

    is_cpu = False
    __torch_function__ = torch._C._disabled_torch_function_impl  # for it alone


@pytest.fixture
def written():
    return NotedRows()


@pytest.fixture
def sink(written):
    return RowSink(written)


def columns(step):
    return {
        "step": torch.tensor([step]),
        "finite": torch.tensor([step % 2 == 0]),
        "loss": torch.tensor([step / 3], dtype=torch.float64),
        "sketch": torch.arange(4.0).view(1, 4) + step,
    }


def append(sink, step):
    here = columns(step)
    away = {name: x.as_subclass(Away) for name, x in here.items() if name != "step"}
    sink.append(f"kind {step}", {"step": here["step"], **away})
    sink.end_step()


def assert_written(written, steps):
    assert [kind for kind, _ in written.rows] == [f"kind {step}" for step in steps]
    for (_, got), step in zip(written.rows, steps, strict=True):
        for name, column in columns(step).items():
            assert got[name].is_cpu
            assert got[name].dtype == column.dtype
            assert torch.equal(got[name], column)


def test_rows_on_the_cpu_are_written_at_once(sink, written):
    sink.append("kind 3", columns(3))
    assert_written(written, [3])


def test_rows_that_are_away_arrive_in_order_when_the_next_leave(
    sink, written, monkeypatch
):
    monkeypatch.setattr(sink_module, "_MOST_PARTS", 2)
    counts = []
    for step in range(5):
        append(sink, step)
        counts.append(len(written.rows))
    assert counts == [0, 0, 0, 2, 2]
    sink.flush()
    assert_written(written, range(5))
    sink.flush()
    assert len(written.rows) == 5


def test_many_bytes_leave_too(sink, written, monkeypatch):
    monkeypatch.setattr(sink_module, "_MOST_BYTES", 30)  # 25 per step
    for step in range(4):
        append(sink, step)
    assert_written(written, [0, 1])


def test_rows_that_did_not_leave_are_dropped_at_the_end(sink, written):
    append(sink, 0)
    sink.close()
    sink.flush()
    assert written.rows == []
