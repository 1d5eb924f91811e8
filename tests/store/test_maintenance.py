import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file

from hf_sketch import ModelSketch, load_sketches
from hf_sketch.cli import main
from hf_sketch.store.header import Header
from hf_sketch.store.rows import PER_EXAMPLE, PER_STEP
from hf_sketch.store.writer import SketchWriter
from tests.store.test_store import SKETCH, step_row

HEADER = Header(SKETCH, row_dtype="float16")


def example_rows(step, ids, rank=0):
    count = len(ids)
    same = {
        name: column.expand(count)
        for name, column in step_row(step).items()
        if name != "sketch"
    }
    return {
        **same,
        "example_id": torch.tensor(ids),
        "micro_step": torch.zeros(count, dtype=torch.int64),
        "rank": torch.full((count,), rank),
        "loss": torch.full((count,), 0.1),
        "weight": torch.ones(count, dtype=torch.float64),
        "sketch": torch.outer(torch.tensor(ids) + 1.0, torch.arange(4.0)) + step,
    }


def write(directory, steps=(1, 2, 3), rank=0, world_size=1, header=HEADER):
    writer = SketchWriter(directory, header, rank=rank, world_size=world_size)
    for step in steps:
        ids = [100 * step + 10 * rank + number for number in range(2)]
        writer.append(PER_EXAMPLE, example_rows(step, ids, rank))
        if rank == 0:
            writer.append(PER_STEP, step_row(step))
        writer.flush()
    writer.close()
    return directory


def test_info_tells_what_is_in_a_store(tmp_path, capsys):
    write(tmp_path / "sketches")
    main(["info", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "out_size=4, layout='blocked', operator='srht', seed=0" in printed
    assert "covers 2 parameters, 40 elements; 0 frozen" in printed
    assert "per_example: 6 rows in 3 files" in printed
    assert "steps 1 to 3" in printed
    assert "measured error: not measured" in printed
    assert "process 0 of 1: up to step 3" in printed


def test_verify_says_what_is_wrong_and_exits_with_1(tmp_path, capsys):
    write(tmp_path)
    main(["verify", str(tmp_path)])
    assert capsys.readouterr().out == "nothing differs from what was written\n"
    path = tmp_path / "per_example-00000-000003.arrow"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(SystemExit, match="1"):
        main(["verify", str(tmp_path)])
    assert f"{path} must have the digest" in capsys.readouterr().out
    main(["repair", str(tmp_path)])
    assert "per_example-00000-000003.arrow with 2 rows was set aside" in (
        capsys.readouterr().out
    )
    main(["repair", str(tmp_path)])
    assert capsys.readouterr().out == "there was nothing to mend\n"


SCRIPT = """
import sys
from pathlib import Path
from tests.store.test_maintenance import write
write(Path(sys.argv[1]), range(1, 9), int(sys.argv[2]), 3)
"""


def test_processes_write_side_by_side(tmp_path):
    write(tmp_path, steps=(), world_size=3)  # as the first process makes the store
    writers = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), str(rank)])
        for rank in (1, 2)
    ]
    write(tmp_path, range(1, 9), 0, 3)
    assert [writer.wait() for writer in writers] == [0, 0]
    store = load_sketches(tmp_path)
    assert len(store.steps) == 8
    assert len(set(store.dataset["example_id"][:])) == 8 * 2 * 3
    steps = store.dataset["step"][:]
    assert steps == sorted(steps)
    assert len(store.dataset) == 8 * 2 * 3


def test_a_process_that_died_early_is_told(tmp_path):
    write(tmp_path, rank=0, world_size=2)
    with pytest.warns(UserWarning, match=r"no rows of the processes \[1\]"):
        assert len(load_sketches(tmp_path).dataset) == 6


def test_stores_of_two_machines_are_joined(tmp_path, capsys):
    one = write(tmp_path / "one", rank=0, world_size=2)
    other = write(tmp_path / "other", rank=1, world_size=2)
    assert not (other / "manifest-00000.json").exists()
    joined = tmp_path / "joined"
    main(["merge", str(one), str(other), "--output_dir", str(joined)])
    assert "process 1 of 2: up to step 3" in capsys.readouterr().out
    main(["verify", str(joined)])
    store = load_sketches(joined)
    assert len(store.steps) == 3
    assert store.dataset["step"][:] == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert store.dataset["rank"][:] == [0, 0, 1, 1] * 3


def test_stores_that_cannot_be_joined_are_named(tmp_path):
    one = write(tmp_path / "one")
    other = write(tmp_path / "other", header=Header(SKETCH, loss="sum"))
    output = ["--output_dir", str(tmp_path / "joined")]
    with pytest.raises(ValueError, match=r"loss='sum'.*, .* loss='mean'.*: only rows"):
        main(["merge", str(one), str(other), *output])
    with pytest.raises(ValueError, match="have rows in common"):
        main(["merge", str(one), str(write(tmp_path / "same")), *output])
    with pytest.raises(ValueError, match="must not be there"):
        main(["merge", str(one), "--output_dir", str(other)])
    shapes = ModelSketch((("weight", (8, 4)), ("skew", (8,))), 4)
    odd = write(tmp_path / "odd", header=Header(shapes, row_dtype="float16"))
    with pytest.raises(ValueError, match="only rows of one map can be joined"):
        main(["merge", str(one), str(odd), *output])


@pytest.mark.parametrize("to", ["parquet", "npy", "safetensors"])
def test_rows_are_exported(tmp_path, capsys, to):
    store, output = write(tmp_path / "sketches"), tmp_path / "out"
    main(["export", str(store), "--to", to, "--output_dir", str(output)])
    files = capsys.readouterr().out.split()
    assert sorted(files) == sorted(map(str, output.iterdir()))
    rows = load_sketches(store).dataset
    ids = rows["example_id"][:]
    expected = torch.outer(torch.tensor(ids) + 1.0, torch.arange(4.0))
    expected += torch.tensor(rows["step"][:]).unsqueeze(1)
    if to == "npy":
        got = torch.from_numpy(np.load(output / "per_example.sketch.npy"))
        got_ids = np.load(output / "per_example.example_id.npy").tolist()
    elif to == "safetensors":
        tensors = load_file(output / "per_example-00000.safetensors")
        got, got_ids = tensors["sketch"], tensors["example_id"].tolist()
    else:
        (path,) = output.glob("per_example*")
        table = load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path))
        table = table["train"].with_format("torch")[:]
        got = table["sketch"]
        got_ids = table["example_id"].tolist()
    assert got_ids == ids
    torch.testing.assert_close(got, expected, rtol=2**-11, atol=0)


def test_an_unknown_format_is_named(tmp_path):
    store = write(tmp_path / "sketches")
    output = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"to must be one of .*, got 'csv'"):
        main(["export", str(store), "--to", "csv", "--output_dir", output])
