"""Steps of a Lanczos run on disk, so that a run that was killed can resume."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import xxhash
from torch import Tensor

from hf_sketch.durable import read_sealed, sync_directory, write_sealed
from hf_sketch.spectra.basis import Basis

STATE: Final = "lanczos.json"
ROWS: Final = "lanczos-rows.bin"


@dataclass(frozen=True, eq=False)
class Steps:
    """The state after some steps, beside the basis.

    Shapes:
        vector (size,)

    Args:
        alphas: the tridiagonal matrix's diagonal, one per step.
        betas: the off-diagonal, one per step; the last one lies outside.
        vector: the basis vector of the next step.
    """

    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    vector: Tensor

    def __len__(self) -> int:
        return len(self.alphas)


class LanczosCheckpoint:
    """The steps of one run, in a directory.

    `lanczos-rows.bin` holds the raw basis vectors, the next step's included;
    `lanczos.json` holds the run, the steps' numbers and the rows' digest. Rows are
    appended and synced before the JSON that counts them is replaced.

    Args:
        directory: created if missing.
        run: settings that must be equal for a run to resume.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, directory: Path, run: Mapping[str, Any]) -> None:
        self._directory = directory
        self._mend = f"restore it, or remove {directory} to start again"
        self._run = {"format_version": 1, **run}
        self._digest = xxhash.xxh3_128()
        self._saved = 0
        directory.mkdir(parents=True, exist_ok=True)

    def load(self, basis: Basis) -> Steps | None:
        """Fill the basis with the stored steps, as far as it reaches.

        Raises:
            ValueError: they belong to another run, or were changed or cut.
        """
        path = self._directory / STATE
        if not path.exists():
            return None
        state = read_sealed(path, self._mend)
        theirs = {name: state.get(name) for name in self._run}
        if theirs != self._run:
            raise ValueError(
                f"{self._directory} holds steps of {_words(theirs)}, but this run has "
                f"{_words(self._run)}. Pass another directory as checkpoint."
            )
        alphas, betas = tuple(state["alphas"]), tuple(state["betas"])
        count = min(len(alphas), len(basis.rows))
        vector = torch.empty_like(basis.rows[0], device=basis.device)
        targets = [*basis.rows[:count], vector]
        self._read_rows(targets, len(alphas) + 1, state["rows_xxh3_128"])
        self._saved = len(alphas)
        return Steps(alphas[:count], betas[:count], vector)

    def save(self, steps: Steps, basis: Basis) -> None:
        """Add the steps that are not stored yet.

        Raises:
            OSError: they cannot be written; the stored steps stay intact.
        """
        if len(steps) <= self._saved:
            return
        digest, saved_rows = self._digest.copy(), self._saved + (self._saved > 0)
        with (self._directory / ROWS).open("ab") as file:
            file.truncate(saved_rows * basis.rows[0].nbytes)
            for row in (*basis.rows[saved_rows : len(steps)], steps.vector):
                data = row.cpu().numpy().data
                file.write(data)
                digest.update(data)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(self._directory)
        content = {"rows_xxh3_128": digest.hexdigest(), **self._run}
        content |= {"alphas": steps.alphas, "betas": steps.betas}
        write_sealed(self._directory / STATE, content)
        self._digest, self._saved = digest, len(steps)

    def _read_rows(self, targets: list[Tensor], rows: int, digest: str) -> None:
        """Check the digest of all rows, and copy the first ones to their places."""
        path = self._directory / ROWS
        expected = rows * targets[0].nbytes
        size = path.stat().st_size if path.exists() else 0
        if size < expected:
            raise ValueError(
                f"{path} must have {expected} bytes, got {size}: {self._mend}."
            )
        row = torch.empty_like(targets[-1]).cpu()
        with path.open("rb") as file:
            for number in range(rows):
                file.readinto(row.numpy().data)
                self._digest.update(row.numpy().data)
                if number < len(targets):
                    targets[number].copy_(row)
        if self._digest.hexdigest() != digest:
            raise ValueError(
                f"{path} must have the digest {digest} in its first {expected} bytes, "
                f"got {self._digest.hexdigest()}: {self._mend}."
            )


def _words(run: Mapping[str, Any]) -> str:
    """Describe the run in an error."""
    return ", ".join(f"{name}={value!r}" for name, value in run.items())
