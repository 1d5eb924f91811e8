"""One writer at a time: a file beside the store names the process that writes."""

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil

from hf_sketch.durable import printable
from hf_sketch.store.log import file_names, manifest_files
from hf_sketch.store.manifest import rank_of

_TRIES, _PAUSE_SECONDS = 50, 0.1


@dataclass(frozen=True)
class _Holder:
    """A process that writes.

    Args:
        host: its machine.
        process: its id there.
        started: when it started, since ids are used again.
        since: when it began to write.
    """

    host: str
    process: int
    started: str
    since: str

    @property
    def is_here(self) -> bool:
        """Whether this machine knows if it is alive."""
        return self.host == socket.gethostname()

    @property
    def is_another(self) -> bool:
        """Whether it is alive on this machine, and not this process."""
        alive = self.is_here and _start_of(self.process) == self.started
        return alive and self.process != os.getpid()

    def __str__(self) -> str:
        since, _, _ = self.since.partition(".")
        host = printable(self.host)
        return f"process {self.process} on {host}, since {printable(since)}"


@dataclass(frozen=True)
class Lock:
    """The right to write a process's files, while its file says so.

    Args:
        path: the file, `<store>-<rank>.lock`.
        content: what it says.
    """

    path: Path
    content: bytes

    def check(self) -> None:
        """Raise if another process writes in place of this one.

        Raises:
            OSError: it has taken the lock over, or has ended since.
        """
        content = None
        with suppress(FileNotFoundError):
            content = self.path.read_bytes()
        if content != self.content:
            holder = None if content is None else _parsed(content)
            who = "" if holder is None else f", {holder}"
            raise OSError(errno.EBUSY, f"another process writes there{who}")

    def release(self) -> None:
        """Remove the file, unless it is that of a later writer."""
        with suppress(FileNotFoundError):
            if self.path.read_bytes() == self.content:
                self.path.unlink()


def take_lock(directory: Path, rank: int, from_afar: bool = False) -> Lock:
    """Become the only writer of a process's files.

    The file is there from the start: `O_EXCL` creates it in one process only, on NFS as
    well. A lock of a process of this machine that is gone, or of an earlier writer in
    this process, is taken over.

    Args:
        directory: the store, which need not be there.
        rank: rank of the process.
        from_afar: take over the lock of a process on another machine as well, with a
            warning. Most likely a scheduler has killed it, and starts the run again
            here; if not, it finds out by `Lock.check`.

    Raises:
        ValueError: another process writes.
        OSError: the file cannot be written.
    """
    path = directory.with_name(f"{directory.name}-{rank:05d}.lock")
    with errors_explained(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
    since = str(datetime.now().astimezone())
    pid = os.getpid()
    holder = _Holder(socket.gethostname(), pid, _start_of(pid) or "", since)
    content = json.dumps(asdict(holder)).encode()
    for _ in range(_TRIES):
        with errors_explained(directory):
            if _write(directory, path, content, from_afar):
                return Lock(path, content)
        time.sleep(_PAUSE_SECONDS)
    raise ValueError(
        f"Cannot write to {directory}: other processes are opening {path}. Start one "
        "after the other."
    )


@contextmanager
def locked(directory: Path) -> Generator[None]:
    """Hold the locks of all processes that have a manifest in a store.

    Raises:
        ValueError: a process writes.
    """
    with ExitStack() as held:
        for name in manifest_files(file_names(directory)):
            held.callback(take_lock(directory, rank_of(name)).release)
        yield


@contextmanager
def errors_explained(directory: Path) -> Generator[None]:
    """Say of an error that a store cannot be begun, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot write sketches to {directory} ({error.strerror}). Give the Trainer"
            " an output_dir that can be written.",
        ) from error


def _write(directory: Path, path: Path, content: bytes, from_afar: bool) -> bool:
    """Write a lock if there is none, or one that is stale; False to try again."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        try:
            file = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            return False
    with os.fdopen(file, "r+b") as opened:
        # Those who find a stale lock decide one after the other. An empty one is new,
        # or its process was killed before it came here.
        if not _alone(file) or not _is_still(path, file):
            return False
        holder = _parsed(opened.read())
        if holder is not None and (
            holder.is_another or not (holder.is_here or from_afar)
        ):
            raise _taken(directory, path, holder)
        if holder is not None and not holder.is_here:
            warnings.warn(
                f"Taking over {directory} from another run: {holder}. If it still runs,"
                " it ends at its next write.",
                stacklevel=4,
            )
        opened.seek(0)
        opened.truncate()
        opened.write(content)
    return True


def _alone(file: int) -> bool:
    """Whether no other process of this machine has opened the file to decide."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without it: O_EXCL alone must do
        pass
    return True


def _is_still(path: Path, file: int) -> bool:
    """Whether an open file has not been removed meanwhile."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _parsed(content: bytes) -> _Holder | None:
    """Return whom a lock names; None if it was cut."""
    with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
        read = json.loads(content)
        host, since = str(read["host"]), str(read["since"])
        return _Holder(host, int(read["process"]), str(read["started"]), since)
    return None


def _start_of(process: int) -> str | None:
    """Return when a process of this machine started; None if it is gone."""
    try:
        # In ticks since the machine started: no change of its clock moves it.
        text = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
        with suppress(psutil.NoSuchProcess):
            return str(psutil.Process(process).create_time())
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def _taken(directory: Path, path: Path, holder: _Holder) -> ValueError:
    gone = "" if holder.is_here else f" If that process is gone, delete {path}."
    return ValueError(
        f"Cannot write to {directory}: another run does ({holder}). Wait for it, end "
        f"it, or pass another output_dir.{gone}"
    )
