"""Losses of retrained models, kept in a file so that an interrupted study goes on."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from hf_sketch.durable import replace_file


class SavedLosses:
    """A training that is done once for each set of rows and seed.

    For `retrain_on_subsets`, in the place of the training.

    Args:
        path: path of the JSON file, written after every training.
        settings: all else that the losses depend on, of plain values.
        train: trains a model on the rows of these numbers with this seed, and gives
            each query's loss, (queries,).

    Raises:
        ValueError: the file is of other settings.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        train: Callable[[Tensor, int], Tensor],
    ) -> None:
        self._path, self._settings, self._train = path, dict(settings), train
        self._losses: dict[str, list[float]] = {}
        if path.is_file():
            saved = json.loads(path.read_text())
            if saved["settings"] != self._settings:
                raise ValueError(
                    f"{path} must be of the settings {self._settings}, got losses of "
                    f"{saved['settings']}: pass another --output_dir, or these."
                )
            self._losses = saved["losses"]

    def __call__(self, rows: Tensor, seed: int) -> Tensor:
        key = f"{xxhash.xxh64_hexdigest(rows.numpy().tobytes())}/{seed}"
        if key not in self._losses:
            self._losses[key] = self._train(rows, seed).tolist()
            self._save()
        return torch.tensor(self._losses[key], dtype=torch.float64)

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        saved = {"settings": self._settings, "losses": self._losses}
        replace_file(self._path, json.dumps(saved).encode())
