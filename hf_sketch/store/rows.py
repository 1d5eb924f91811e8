"""The kinds of rows in a store, their columns, and the dtypes of their sketches."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

import pyarrow as pa
import torch
from datasets import Features, List, Value
from torch import Tensor

PER_EXAMPLE: Final = "per_example"
PER_STEP: Final = "per_step"
UPDATE: Final = "update"
QUERY: Final = "query"
ROW_DTYPES: Final = ("float32", "float16", "int8")
BALANCE_SIZE: Final = 16
_INT8_STEPS = 127
_FLOAT16_BITS = 15  # the largest entry lies in [2**14, 2**15)
_LEAST_EXPONENT = -100
_PIECE_BYTES = 2**21

_COLUMNS = {
    PER_EXAMPLE: {
        "example_id": "int64",
        "epoch": "int32",
        "step": "int32",
        "micro_step": "int32",
        "rank": "int32",
        "learning_rate": "float64",
        "loss": "float32",
        "weight": "float64",
        "gradient_norm": "float32",
        "finite": "bool",
    },
    PER_STEP: {
        "epoch": "int32",
        "step": "int32",
        "learning_rate": "float64",
        "gradient_norm": "float64",
        "clip_factor": "float64",
        "finite": "bool",
    },
    UPDATE: {
        "epoch": "int32",
        "step": "int32",
        "learning_rate": "float64",
        "by_optimizer": "bool",
        "finite": "bool",
    },
    QUERY: {
        "example_id": "int64",
        "loss": "float32",
        "gradient_norm": "float32",
        "finite": "bool",
    },
}
ANSWER_COLUMNS: Final = ("reward", "advantage")
_OPTIONAL = {
    "part": "int32",  # where rows of one example are kept apart
    **dict.fromkeys(ANSWER_COLUMNS, "float32"),  # where they are of generated answers
}


def features(
    kind: str,
    out_size: int,
    row_dtype: str = "float32",
    optional: Collection[str] = (),
    groups: int = 1,
) -> Features:
    """Return the columns of a kind of rows, with the sketch as a fixed-size list.

    Args:
        kind: the kind.
        out_size: numbers per row.
        row_dtype: dtype of the sketches.
        optional: names, with those of columns that not all rows of examples have.
        groups: number of groups of layers in a row, each with a scale of its own.
    """
    columns: dict[str, Value | List] = {
        name: Value(dtype) for name, dtype in _COLUMNS[kind].items()
    }
    if kind == PER_EXAMPLE:
        some = {name: Value(_OPTIONAL[name]) for name in _OPTIONAL if name in optional}
        columns |= some
    row_dtype = kept_dtype(kind, row_dtype)
    if kind == UPDATE:
        columns["balance"] = List(Value("float64"), length=BALANCE_SIZE)
    if row_dtype != "float32":
        scale = Value("float32")
        columns["scale"] = scale if groups == 1 else List(scale, length=groups)
    return Features(**columns, sketch=List(Value(row_dtype), length=out_size))


def kept_dtype(kind: str, row_dtype: str) -> str:
    """Return the dtype of a kind's sketches: updates add up only if they are exact."""
    return "float32" if kind == UPDATE else row_dtype


def row_columns(sketches: Tensor, **values: Tensor | float) -> dict[str, Tensor]:
    """The columns of rows: their sketches, other values, and what these do not say.

    Shapes:
        sketches (rows, out_size); each value (rows,), or a number for all rows
    """
    columns = {"sketch": sketches}
    if "gradient_norm" not in values:
        columns["gradient_norm"] = sketches.norm(dim=1)
    if "finite" not in values:
        columns["finite"] = sketches.isfinite().all(1)
    for name, value in values.items():
        if not isinstance(value, Tensor):
            dtype = torch.int64 if isinstance(value, int) else torch.float64
            value = torch.full((len(sketches),), value, dtype=dtype)
        columns[name] = value
    return columns


def arrow_table(kind: str, columns: Mapping[str, Tensor]) -> pa.Table:
    """Return rows as an Arrow table; sketches without a scale become float32.

    Shapes:
        every column (rows,), `sketch` (rows, out_size) as `joined` leaves it
    """
    sketches, groups = columns["sketch"], 1
    if "scale" not in columns:
        sketches = sketches.to(torch.float32)
    elif columns["scale"].dim() == 2:
        groups = columns["scale"].shape[1]
    row_dtype = str(sketches.dtype).removeprefix("torch.")
    settings = sketches.shape[1], row_dtype, columns, groups
    schema = features(kind, *settings).arrow_schema
    columns = {**columns, "sketch": sketches}
    arrays = [_array(columns[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(column: Tensor, kind: pa.DataType) -> pa.Array:
    """A column, (rows,) or (rows, n), as Arrow has it."""
    if column.dim() == 1:
        return pa.array(column.cpu().numpy()).cast(kind)
    flat = pa.array(column.cpu().reshape(-1).numpy())
    return pa.FixedSizeListArray.from_arrays(flat, column.shape[1])


def joined(
    parts: Sequence[Mapping[str, Tensor]], row_dtype: str, groups: int = 1
) -> dict[str, Tensor]:
    """Join sets of rows into one, with `sketch` in a dtype, and `scale` if it has one.

    Groups of layers have scales of their own: the gradients of some are hundreds of
    times as small as those of others.

    Shapes:
        every column (rows,), `sketch` (rows, out_size), `scale` of several groups
        (rows, groups)
    """
    names = [name for name in parts[0] if name != "sketch"]
    columns = {name: torch.cat([part[name] for part in parts]) for name in names}
    sketches = [part["sketch"] for part in parts]
    if row_dtype == "float32":
        return {**columns, "sketch": torch.cat(sketches)}
    if groups == 1:
        scale, kept = encode(sketches, row_dtype)
        return {**columns, "scale": scale, "sketch": kept}
    apart = [x.unflatten(1, (groups, -1)).flatten(0, 1) for x in sketches]
    scale, kept = encode(apart, row_dtype)
    columns["scale"] = scale.unflatten(0, (-1, groups))
    return {**columns, "sketch": kept.unflatten(0, (-1, groups)).flatten(1)}


def encode(parts: Sequence[Tensor], row_dtype: str) -> tuple[Tensor, Tensor]:
    """Return each row's scale, and its numbers divided by it, in a dtype.

    Scales of "float16" are powers of two, so that only the rounding to 11 bits is lost,
    whatever the row's norm; "int8" rounds to 1/127 of the largest number. A row that is
    not finite stays so: its scale is 1, or NaN with "int8".

    Shapes:
        each part (its rows, n) -> (all rows,), float32 and (all rows, n)
    """
    shape = sum(map(len, parts)), parts[0].shape[1]
    kept = parts[0].new_empty(shape, dtype=getattr(torch, row_dtype))
    scales: list[Tensor] = []
    low = 0
    for piece in _pieces(parts):
        high = low + len(piece)
        scales.append(_encode_piece(piece, kept[low:high]))
        low = high
    return torch.cat(scales), kept


def _pieces(parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the rows in float32, as many at a time as a processor's cache holds.

    A piece may be changed; the next one reuses its memory.
    """
    width = parts[0].shape[1]
    most = max(1, _PIECE_BYTES // (4 * width))
    memory = parts[0].new_empty(most, width, dtype=torch.float32)
    group: list[Tensor] = []
    free = most
    for rows in (rows for part in parts for rows in part.split(most)):
        if len(rows) > free:
            yield torch.cat(group, out=memory[: most - free])
            group, free = [], most
        group.append(rows)
        free -= len(rows)
    if group:
        yield torch.cat(group, out=memory[: most - free])


def _encode_piece(sketches: Tensor, kept: Tensor) -> Tensor:
    """Fill `kept`, which has the dtype, and return the scales; changes `sketches`."""
    if kept.dtype == torch.float32:
        kept.copy_(sketches)
        return sketches.new_ones(len(sketches))
    largest = torch.maximum(sketches.amax(1), -sketches.amin(1))
    finite = largest.isfinite()
    usable = finite & (largest > 0)
    if kept.dtype == torch.float16:
        exponents = largest.frexp().exponent.clamp(min=_LEAST_EXPONENT)
        powers = torch.exp2((exponents - _FLOAT16_BITS).to(largest))
        scale = powers.where(usable, 1.0)
        kept.copy_(sketches.div_(scale.unsqueeze(1)))
        return scale
    scale = (largest / _INT8_STEPS).where(usable, 1.0).where(finite, torch.nan)
    whole = sketches.div_(scale.unsqueeze(1)).round_()
    kept.copy_(whole.where(finite.unsqueeze(1), 0.0))
    return scale


def decode(scale: Tensor, sketches: Tensor) -> Tensor:
    """Return the rows that `encode` was given, up to its rounding.

    Shapes:
        scale (rows,), sketches (rows, n) -> (rows, n), float32
    """
    return sketches.to(torch.float32) * scale.unsqueeze(1)
