import errno
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from datasets import load_dataset
from safetensors.torch import load_file

from hf_sketch import ModelSketch, load_sketches
from hf_sketch.cli import main
from hf_sketch.store.header import Header
from tests.helpers.stores import SKETCH, write_store


def test_info_shows_what_is_in_a_store(tmp_path, capsys):
    write_store(tmp_path / "sketches")
    main(["info", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "out_size=4, layout='blocked', operator='srht', seed=0" in printed
    assert "covers 2 parameters, 40 elements; 0 frozen" in printed
    assert "per_example: 6 rows in 3 files" in printed
    assert "steps 1 to 3" in printed
    assert "measured error: not measured" in printed
    assert "process 0 of 1: up to step 3" in printed


def test_info_names_the_groups_of_layers(tmp_path, capsys):
    shapes = (("a.weight", (8, 4)), ("b.weight", (8, 4)), ("b.bias", (8,)))
    sketch = ModelSketch(shapes, 2, groups=("first", "second", "second"))
    write_store(tmp_path / "sketches", header=Header(sketch))
    main(["info", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "groups=['first', 'second'], out_size=2" in printed
    assert "  group first: 1 parameters, 32 elements\n" in printed
    assert "  group second: 2 parameters, 40 elements\n" in printed


def test_verify_says_what_is_wrong_and_exits_with_1(tmp_path, capsys):
    write_store(tmp_path)
    main(["verify", str(tmp_path)])
    assert capsys.readouterr().out == "nothing differs from what was written\n"
    path = tmp_path / "per_example-00000-000003.arrow"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(SystemExit, match="1"):
        main(["verify", str(tmp_path)])
    assert f"{path} was changed: the checksum" in capsys.readouterr().out
    main(["repair", str(tmp_path)])
    assert "per_example-00000-000003.arrow with 2 rows was set aside" in (
        capsys.readouterr().out
    )
    main(["repair", str(tmp_path)])
    assert capsys.readouterr().out == "there was nothing to mend\n"


def test_processes_write_side_by_side(tmp_path):
    write_store(
        tmp_path, steps=(), world_size=3
    )  # as the first process makes the store
    writers = [
        threading.Thread(target=write_store, args=(tmp_path, range(1, 9), rank, 3))
        for rank in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    store = load_sketches(tmp_path)
    assert len(store.steps) == 8
    assert len(set(store.dataset["example_id"][:])) == 8 * 2 * 3
    steps = store.dataset["step"][:]
    assert steps == sorted(steps)
    assert len(store.dataset) == 8 * 2 * 3


def test_a_process_that_died_early_is_reported(tmp_path):
    write_store(tmp_path, rank=0, world_size=2)
    with pytest.warns(UserWarning, match=r"no rows of the processes \[1\]"):
        assert len(load_sketches(tmp_path).dataset) == 6


def test_stores_of_two_machines_are_joined(tmp_path, capsys):
    one = write_store(tmp_path / "one", rank=0, world_size=2)
    other = write_store(tmp_path / "other", rank=1, world_size=2)
    assert not (other / "manifest-00000.jsonl").exists()
    joined = tmp_path / "joined"
    main(["merge", str(one), str(other), "--output_dir", str(joined)])
    assert "process 1 of 2: up to step 3" in capsys.readouterr().out
    main(["verify", str(joined)])
    store = load_sketches(joined)
    assert len(store.steps) == 3
    assert store.dataset["step"][:] == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert store.dataset["rank"][:] == [0, 0, 1, 1] * 3


def test_stores_that_cannot_be_joined_are_named(tmp_path):
    one = write_store(tmp_path / "one")
    other = write_store(tmp_path / "other", header=Header(SKETCH, loss="sum"))
    output = ["--output_dir", str(tmp_path / "joined")]
    with pytest.raises(ValueError, match=r"loss='sum'.*, .* loss='mean'.* Merge only"):
        main(["merge", str(one), str(other), *output])
    with pytest.raises(ValueError, match="hold the same rows"):
        main(["merge", str(one), str(write_store(tmp_path / "same")), *output])
    with pytest.raises(ValueError, match="name a store twice"):
        main(["merge", str(one), str(one / ".." / "one"), *output])
    with pytest.raises(ValueError, match=r"exists\. Pass the name of a new"):
        main(["merge", str(one), "--output_dir", str(other)])
    shapes = ModelSketch((("weight", (8, 4)), ("skew", (8,))), 4)
    odd = write_store(tmp_path / "odd", header=Header(shapes, row_dtype="float16"))
    with pytest.raises(ValueError, match="Merge only stores with the same settings"):
        main(["merge", str(one), str(odd), *output])


@pytest.mark.parametrize("to", ["parquet", "npy", "safetensors"])
def test_rows_are_exported(tmp_path, capsys, to):
    store, output = write_store(tmp_path / "sketches"), tmp_path / "out"
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
    store = write_store(tmp_path / "sketches")
    output = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"to is 'csv'. Pass one of"):
        main(["export", str(store), "--to", "csv", "--output_dir", output])


KILLED = """
import os, signal, sys
from hf_sketch.cli import main
left, real = [3], os.replace
def replace(*paths):
    real(*paths)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
main(["merge", sys.argv[1], "--output_dir", sys.argv[2]])
"""


def test_a_killed_merge_leaves_nothing_that_opens_and_can_be_repeated(tmp_path):
    store, output = write_store(tmp_path / "sketches"), tmp_path / "joined"
    command = [sys.executable, "-c", KILLED, str(store), str(output)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert not output.exists()
    assert (tmp_path / ".joined.part").exists()
    main(["merge", str(store), "--output_dir", str(output)])
    assert len(load_sketches(output).dataset) == len(load_sketches(store).dataset)
    assert not (tmp_path / ".joined.part").exists()


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    store, output = write_store(tmp_path / "sketches"), tmp_path / "out"
    command = ["export", str(store), "--to", "npy", "--output_dir", str(output)]
    with monkeypatch.context() as broken:
        broken.setattr(np.lib.format, "open_memmap", full_disk)
        with pytest.raises(OSError, match="No space left"):
            main(command)
    assert [path.name for path in tmp_path.iterdir()] == ["sketches"]
    main(command)
    assert (output / "per_example.sketch.npy").exists()
    with pytest.raises(FileExistsError, match=r"out exists\. Pass the name"):
        main(command)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")
