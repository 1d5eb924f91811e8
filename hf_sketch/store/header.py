"""What the rows of a store were made with; docs/format.md is the format."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from datasets import Features
from safetensors import SafetensorError

from hf_sketch.durable import printable, read_sealed, replace_file, write_sealed
from hf_sketch.examples.measured_error import MeasuredError
from hf_sketch.model.normalizer import Normalizer
from hf_sketch.model.sketch import LAYOUTS, ModelSketch
from hf_sketch.sketches.by_name import OPERATORS
from hf_sketch.store.checks.check_value import verify_map
from hf_sketch.store.checks.schema import (
    BYTES,
    PROCESSES,
    STEPS,
    check_content,
    digest,
    flag,
    many,
    nullable,
    number,
    one_of,
    record,
    row,
    text,
    whole,
)
from hf_sketch.store.rows import ANSWER_COLUMNS, ROW_DTYPES, features

HEADER: Final = "header.json"
NORMALIZER: Final = "normalizer.safetensors"
_FIX: Final = "Restore it, or get the store from somebody you trust."
# Each field of a map changes it, so those of later releases are refused.
_MAP: Final = record(
    {
        "shapes": many(row(text, many(whole(0, 2**40), most=16))),
        "out_size": whole(1, STEPS),
        "layout": one_of(*LAYOUTS),
        "seed": whole(-(2**63), 2**64 - 1),
        "operator": one_of(*OPERATORS),
        "frozen": many(text),
    },
    {
        "groups": many(text),
        "normalizer": record(
            {"kind": one_of("adam"), "step": whole(0, BYTES), "xxh3_128": digest}
        ),
    },
)
_ERROR: Final = record(
    {
        "examples": whole(0, BYTES),
        "pearson_r": nullable(number),
        "relative_error": nullable(number),
        "row_error": number,
    },
    {"top_found": nullable(number)},
)
# Other fields are those of later releases, which may be ignored.
_RULE: Final = record(
    {
        "model_sketch": _MAP,
        "loss": one_of("mean", "sum"),
        "row_dtype": one_of(*ROW_DTYPES),
        "measured_error": nullable(_ERROR),
        "check_value": many(number, most=16),
    },
    {
        "units": text,
        "step_examples": nullable(whole(1, BYTES)),
        "processes": nullable(whole(1, PROCESSES)),
        "unverified": nullable(text),
        "per_row": flag,
        "answers": flag,
        "unowned": nullable(number),
        "train_rows": nullable(whole(0, BYTES)),
    },
    closed=False,
)
_UNITS = (
    "a row is the gradient of the example's own loss; the sum of weight * row over a "
    "step's examples is the step's gradient before clipping"
)


@dataclass(frozen=True)
class Header:
    """What the rows of a store were made with.

    Args:
        model_sketch: the map from gradients to rows.
        loss: reduction of an example's own loss: the "mean" or the "sum" over its
            tokens.
        row_dtype: dtype of stored sketches; see `hf_sketch.store.rows.encode`.
        measured_error: error of the rows' inner products, if it was measured.
        step_examples: examples per optimizer step, over all processes; None if unknown.
        processes: processes of the latest run; None if unknown.
        unverified: why the gradients of the model's modules were not compared with
            those of single examples before rows were recorded; None if they were, or if
            the store is older than that comparison.
        per_row: rows of one example are kept apart, with a column `part`.
        answers: rows are of generated answers, with columns `reward` and `advantage`.
        unowned: part of the norm of a first step's gradient that belongs to no example,
            as that of a router's balancing loss; None if it was not compared.
        train_rows: rows of the dataset that was trained on; None if unknown.
    """

    model_sketch: ModelSketch
    loss: str = "mean"
    row_dtype: str = "float32"
    measured_error: MeasuredError | None = None
    step_examples: int | None = None
    processes: int | None = None
    unverified: str | None = None
    per_row: bool = False
    answers: bool = False
    unowned: float | None = None
    train_rows: int | None = None

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """The names of the columns that not all rows of examples have."""
        part = ("part",) if self.per_row else ()
        return (*part, *ANSWER_COLUMNS) if self.answers else part

    def features(self, kind: str) -> Features:
        """Return the columns of a kind of the store's rows."""
        sketch = self.model_sketch
        groups = sketch.layer_groups.count
        settings = sketch.row_size, self.row_dtype, self.optional_columns, groups
        return features(kind, *settings)

    @property
    def settings(self) -> str:
        """What must be equal for rows to be added, on one line."""
        sketch = self.model_sketch
        moments = sketch.normalizer
        normalized = "" if moments is None else f"normalizer={moments.to_dict()}, "
        named = f"groups={[*sketch.layer_groups.columns]}, " if sketch.groups else ""
        return (
            f"{normalized}{named}out_size={sketch.out_size}, layout={sketch.layout!r}, "
            f"operator={sketch.operator!r}, seed={sketch.seed}, loss={self.loss!r}, "
            f"row_dtype={self.row_dtype!r}, per_row={self.per_row}, "
            f"answers={self.answers}, "
            f"{len(sketch.shapes)} parameters, {sketch.in_size} elements"
        )

    def fits(self, other: "Header") -> bool:
        """Return whether rows of one may be added to rows of the other."""
        mine = self.model_sketch, self.loss, self.row_dtype, self.optional_columns
        return mine == (
            other.model_sketch,
            other.loss,
            other.row_dtype,
            other.optional_columns,
        )


def _read_version_1(
    content: Mapping[str, Any], normalizer: Normalizer | None
) -> Header:
    error: dict[str, Any] | None = content["measured_error"]
    return Header(
        ModelSketch.from_dict(content["model_sketch"], normalizer),
        content["loss"],
        content["row_dtype"],
        None if error is None else MeasuredError(**error),
        # Releases before these keys wrote files of this version too.
        content.get("step_examples"),
        content.get("processes"),
        content.get("unverified") and printable(content["unverified"]),
        content.get("per_row", False),
        content.get("answers", False),
        content.get("unowned"),
        content.get("train_rows"),
    )


# Every version that a release wrote keeps its line, so that its stores open for good.
# Version 2 differs in the manifests alone.
READERS: Final = {1: _read_version_1, 2: _read_version_1}
FORMAT_VERSION: Final = max(READERS)


def write_header(directory: Path, header: Header) -> None:
    """Replace the header in one step, after the normalizer that it describes."""
    sketch = header.model_sketch
    if sketch.normalizer is not None:
        _write_normalizer(directory / NORMALIZER, sketch.normalizer)
    plain = replace(header, model_sketch=replace(sketch, normalizer=None))
    content = {
        "format_version": FORMAT_VERSION,
        "units": _UNITS,
        **asdict(plain),
        "model_sketch": sketch.to_dict(),
        "check_value": sketch.check_value(),
    }
    write_sealed(directory / HEADER, content)


def read_header(directory: Path) -> Header:
    """Read a store's header, and verify the check value of its map.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: the header was changed, has an unknown version, or describes a map
            that this installation computes differently.
    """
    path = directory / HEADER
    if not path.is_file():
        raise FileNotFoundError(
            f"No sketches at {directory}. Pass the output_dir (or the 'sketches' "
            "directory in it) of a run with GradientSketchCallback."
        )
    content = read_sealed(path, "restore it from a copy of the store")
    version = content.get("format_version")
    if not isinstance(version, int) or version not in READERS:
        raise ValueError(
            f"{path} has format_version {version!r}, and this hf-sketch reads versions "
            f"up to {FORMAT_VERSION}. Upgrade it: pip install --upgrade hf-sketch."
        )
    check_content(path, content, _RULE, _FIX)
    normalizer = _read_normalizer(directory, content)
    try:
        header = READERS[version](content, normalizer)
    except ValueError as error:
        raise ValueError(f"{path} describes no map: {error}") from error
    verify_map(path, header.model_sketch, content["check_value"])
    return header


def is_current(directory: Path) -> bool:
    """Return whether a store's header has the newest version."""
    return read_sealed(directory / HEADER)["format_version"] == FORMAT_VERSION


def _write_normalizer(path: Path, normalizer: Normalizer) -> None:
    """Write the numbers unless they are there."""
    content = normalizer.to_bytes()
    if not path.is_file() or path.read_bytes() != content:
        replace_file(path, content)


def _read_normalizer(directory: Path, content: Mapping[str, Any]) -> Normalizer | None:
    """Return the normalizer of a store's map, if it has one."""
    described = content["model_sketch"].get("normalizer")
    if described is None:
        return None
    path = directory / NORMALIZER
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, which the rows' gradients were divided by. Restore it "
            "from a copy of the store."
        )
    try:
        return Normalizer.from_bytes(path.read_bytes(), described["step"])
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. {_FIX}") from None
