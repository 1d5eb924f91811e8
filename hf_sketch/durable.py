"""Files that are there whole or not at all, and JSON that carries its checksum."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any, Final, cast

import xxhash

_SEAL: Final = b'{\n "xxh3_128": "'
_NO_DIGEST: Final = b"0" * 32
_LEAST_PARTS: Final = 2**16


class Draft:
    """A file under a temporary name until its content is on the disk.

    Args:
        path: its final name.
        content: what it begins with; `extend` adds more.

    Raises:
        OSError: it cannot be written, here or later; then it is removed.
    """

    def __init__(self, path: Path, content: bytes | memoryview) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = self._temporary.open("w+b")
        self.extend(lambda file: file.write(content))

    def extend(self, write: Callable[[IO[bytes]], object]) -> None:
        """Add what a function writes to the file."""
        with self._removed_on_error():
            write(self._file)
            self._file.flush()

    @property
    def data(self) -> memoryview:
        """The content, mapped."""
        return memoryview(mmap(self._file.fileno(), 0, access=ACCESS_READ))

    def finish(self) -> None:
        """Sync the content, then rename the file; its directory is not synced."""
        with self._removed_on_error():
            os.fsync(self._file.fileno())
            os.replace(self._temporary, self._path)  # noqa: PTH105 - as it is named
            self._file.close()

    def discard(self) -> None:
        """Remove the file; one that is finished stays."""
        self._temporary.unlink(missing_ok=True)
        self._file.close()

    @contextmanager
    def _removed_on_error(self) -> Generator[None]:
        try:
            yield
        except OSError:
            self.discard()
            raise


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file that is there whole or not at all, also after a crash.

    The content is synced under a temporary name, then renamed, then the directory is
    synced.

    Raises:
        OSError: the file cannot be written; what was there before still is.
    """
    Draft(path, data).finish()
    sync_directory(path.parent)


def append_file(path: Path, size_bytes: int, data: bytes) -> None:
    """Add to a file of a known length, and sync it.

    Raises:
        OSError: there is no room, then the file is as before; or it has another length,
            as another process writes to it.
    """
    file = os.open(path, os.O_WRONLY)
    try:
        found = os.fstat(file).st_size
        if found != size_bytes:
            what = f"{path.name} has {found} bytes, not {size_bytes}"
            raise OSError(errno.EBUSY, f"another process writes here: {what}")
        try:
            os.lseek(file, size_bytes, os.SEEK_SET)
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)
        except OSError:
            os.ftruncate(file, size_bytes)
            raise
    finally:
        os.close(file)


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def new_directory(path: Path) -> Generator[Path]:
    """Fill a new directory whole or not at all.

    Yields a hidden directory beside it, which is renamed at the end and removed after
    an error. What a process that was killed has left there is removed first.

    Raises:
        FileExistsError: there is something of that name.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists. Pass the name of a new directory.")
    part = path.with_name(f".{path.name}.part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    sync_directory(path.parent)


def set_aside(directory: Path) -> Path:
    """Rename a directory to the first free name of `<name>-before-<n>`."""
    number = 1
    while (aside := directory.with_name(f"{directory.name}-before-{number}")).exists():
        number += 1
    return directory.rename(aside)


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that starts with its checksum, computed with zeros in its place.

    Raises:
        OSError: the file cannot be written.
    """
    sealed = {"xxh3_128": _NO_DIGEST.decode(), **content}
    data = json.dumps(sealed, indent=1).encode()
    replace_file(path, data.replace(_NO_DIGEST, _digest(data), 1))


def printable(text: str) -> str:
    """Return a text that changes nothing of a terminal or page that shows it.

    Control characters and those that turn the direction of writing are spelt out.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode()
        for c in text
    )


def parse_object(path: Path, data: bytes) -> dict[str, Any]:
    """Read a JSON object of a file.

    Raises:
        ValueError: it is none; the error names the file.
    """
    # Python's objects take some ten times as much memory as the densest JSON.
    if sum(map(data.count, b"[{,")) > _LEAST_PARTS + len(data) // 8:
        raise ValueError(f"{path} has too many values for its length: restore it.")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON that can be read ({error}).") from None
    if type(content) is not dict:
        raise ValueError(f"{path} holds no JSON object: restore it.")
    return cast(dict[str, Any], content)


def read_sealed(
    path: Path, mend: str = "restore it", version: int | None = None
) -> dict[str, Any]:
    """Read what `write_sealed` wrote, without the checksum.

    Args:
        path: the file.
        mend: what to do if it is damaged, for the error.
        version: the only `format_version` that it may have, which is taken out; None
            leaves it to the caller.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a byte differs from what was written, or it has another version.
    """
    data = path.read_bytes()
    start = len(_SEAL)
    end = start + len(_NO_DIGEST)
    digest = data[start:end]
    blank = data[:start] + _NO_DIGEST + data[end:]
    if not data.startswith(_SEAL) or digest != _digest(blank):
        got = (
            ascii(digest.decode("latin-1"))[1:-1] if data.startswith(_SEAL) else "none"
        )
        raise ValueError(
            f"{path} must have the digest {_digest(blank).decode()} of its content, "
            f"got {got}: the file was changed or cut; {mend}."
        )
    content = parse_object(path, data)
    del content["xxh3_128"]
    if version is not None and (found := content.pop("format_version")) != version:
        raise ValueError(
            f"{path} has format_version {found!r}, and this hf-sketch reads {version}. "
            "Open it with the hf-sketch that wrote it."
        )
    return content


def _digest(data: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(data).encode()
