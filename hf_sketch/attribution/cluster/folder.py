"""The folder through which tasks hand on their results: a directory or a URL."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from fsspec.core import url_to_fs
from pyarrow import parquet

from hf_sketch.durable import replace_file
from hf_sketch.store.locations import is_remote


@dataclass(frozen=True)
class TaskFolder:
    """Files that are there whole or not at all, so that a task may run again.

    Args:
        root: a directory that all machines reach, or a URL that fsspec writes to.
    """

    root: str

    @classmethod
    def at(cls, folder: str | Path) -> "TaskFolder":
        """Return that at a path, absolute, for tasks with other working directories."""
        return cls(str(folder if is_remote(folder) else Path(folder).absolute()))

    def path(self, name: str) -> str:
        """Return the path or URL of a file."""
        return f"{self.root.rstrip('/')}/{name}"

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Replace a file; object stores do so when the upload is complete."""
        path = self.path(name)
        if is_remote(path):
            files, inner = url_to_fs(path)
            files.pipe_file(inner, bytes(data))
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replace_file(Path(path), data)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if there is none."""
        files, inner = url_to_fs(self.path(name))
        try:
            return files.cat_file(inner)
        except FileNotFoundError:
            return None

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file."""
        sink = pa.BufferOutputStream()
        parquet.write_table(table, sink)
        self.write(name, memoryview(sink.getvalue()))

    def read_table(self, name: str) -> pa.Table:
        """Read a Parquet file.

        Raises:
            FileNotFoundError: an earlier task has not written it.
        """
        data = self.read(name)
        if data is None:
            raise FileNotFoundError(
                f"{self.path(name)} is missing. Run the stages in order, each when all "
                "tasks of the one before are complete."
            )
        return parquet.read_table(pa.BufferReader(data))
