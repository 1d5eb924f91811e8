"""The weights in a checkpoint's folder, read one tensor at a time."""

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

_FILES = ("model.safetensors", "adapter_model.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint, and the step that they are of.

    Args:
        source: a folder that a Trainer or `save_pretrained` wrote, of a model or of an
            adapter; or the weights by name, as in a state dict.
    """

    source: Path | Mapping[str, Tensor]

    def __str__(self) -> str:
        return str(self.source) if isinstance(self.source, Path) else "the weights"

    @cached_property
    def step(self) -> int | None:
        """The optimizer steps before it; None if its folder does not say."""
        if not isinstance(self.source, Path):
            return None
        state = self.source / "trainer_state.json"
        if not state.is_file():
            return None
        return int(json.loads(state.read_text())["global_step"])

    @property
    def names(self) -> Set[str]:
        """The names of all tensors, as they are stored."""
        return self._files.keys()

    def tensor(self, name: str) -> Tensor:
        """Return the weights of a parameter.

        Raises:
            ValueError: there are none, or their file cannot be read.
        """
        stored = self._stored_name(name)
        if stored is None:
            raise ValueError(
                f"{self} has no parameter {name!r}. Load the model, and pass "
                "dict(model.named_parameters()) to hf_sketch.verify_training."
            )
        if not isinstance(self.source, Path):
            return self.source[stored].detach()
        path = self._files[stored]
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}.") from None

    def _stored_name(self, name: str) -> str | None:
        """The name in the file: PEFT leaves the adapter's own out of it."""
        if name in self._files:
            return name
        parts = name.split(".")
        for place, part in enumerate(parts):
            shorter = parts[:place] + parts[place + 1 :]
            if part == "modules_to_save":
                shorter = parts[:place] + parts[place + 2 :]
            stored = ".".join(shorter)
            for found in (stored, stored.removesuffix(".weight")):
                if found in self._files:
                    return found
        return None

    @cached_property
    def _files(self) -> dict[str, Path]:
        """The file of each tensor, by its name."""
        if not isinstance(self.source, Path):
            return dict.fromkeys(self.source, Path())
        for name in _FILES:
            if (path := self.source / name).is_file():
                with safe_open(path, "pt") as file:
                    return dict.fromkeys(file.keys(), path)
            if (index := path.with_suffix(".safetensors.index.json")).is_file():
                places = json.loads(index.read_text())["weight_map"]
                return {tensor: self.source / file for tensor, file in places.items()}
        raise FileNotFoundError(
            f"{self.source} has no {' and no '.join(_FILES)}. Pass the folder of a "
            "checkpoint, such as <output_dir>/checkpoint-500."
        )
