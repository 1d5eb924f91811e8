"""Heads of Arrow files, checked before Arrow reads them.

Arrow trusts the lengths that a head claims, and crashes where the file has fewer bytes.
The two messages of a head are FlatBuffers: https://flatbuffers.dev/internals, with
Arrow's Message.fbs and Schema.fbs. Only what rows of a store consist of passes: columns
of numbers, or of lists of equally many, in one record batch, without nulls, compression
or dictionaries.
"""

import json
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

MOST_HEAD_BYTES: Final = 2**14
_END: Final = b"\xff\xff\xff\xff\0\0\0\0"
_MARK: Final = 0xFFFFFFFF
_SCHEMA, _RECORD_BATCH = 1, 3
_INT, _FLOAT, _BOOL, _FIXED_SIZE_LIST = 2, 3, 6, 16
_FLOAT_BITS: Final = (16, 32, 64)
_FEATURE_KEYS: Final = {"_type", "dtype", "feature", "id", "length"}


@dataclass(frozen=True)
class Head:
    """What comes before the columns of an Arrow file.

    Args:
        rows: number of rows.
        size_bytes: where the columns start.
    """

    rows: int
    size_bytes: int


def read_head(path: Path) -> Head:
    """Return the head of an Arrow file, whose columns are whole.

    Raises:
        ValueError: it is no file of rows.
    """
    try:
        with path.open("rb", buffering=0) as file:
            data = file.read(MOST_HEAD_BYTES)
            size = file.seek(0, 2)
            file.seek(max(0, size - len(_END)))
            end = file.read()
        if end != _END:
            raise ValueError("it does not end as an Arrow stream of one batch")
        return _head(data, size)
    except (ValueError, struct.error, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no Arrow file of rows: {error}.") from None


def _head(data: bytes, size: int) -> Head:
    """Return the head of a file of some length, which starts with these bytes."""
    schema, start = _message(data, 0)
    message, end = _message(data, start)
    return Head(_rows(schema, message, size - len(_END) - end), end)


@lru_cache(maxsize=64)
def _rows(schema: bytes, message: bytes, size: int) -> int:
    """Return the number of rows whose columns have some bytes.

    Files of equally many rows have the same head, which is read once.
    """
    multiples, bits = _layout(schema)
    root = _root(message)
    batch = _header(root, _RECORD_BATCH)
    rows = batch.number(0, "<q")
    body = root.number(3, "<q")
    if rows < 1 or body != size:
        raise ValueError(f"it has {rows} rows in {body} bytes")
    if batch.at_field(3) or batch.at_field(4):
        raise ValueError("its columns are compressed or of unknown kind")
    nodes = batch.structs(1, "<qq")
    if nodes != [(rows * each, 0) for each in multiples]:
        raise ValueError(f"its columns have not {rows} numbers each")
    buffers = batch.structs(2, "<qq")
    if len(buffers) != len(bits):
        raise ValueError(f"it has {len(buffers)} buffers, not {len(bits)}")
    for (offset, length), each in zip(buffers, bits, strict=True):
        inside = offset >= 0 and length >= 0 and offset + length <= body
        if not inside or offset % 8 or 8 * length < rows * each:
            raise ValueError(f"a column lies at {offset} to {offset + length}")
    return rows


def _message(data: bytes, at: int) -> tuple[bytes, int]:
    """Return a message, and where it ends."""
    mark, length = struct.unpack_from("<Ii", data, at)
    start = at + 8
    if mark != _MARK or not 0 < length <= len(data) - start:
        raise ValueError(f"its message at {at} has {length} bytes")
    return data[start : start + length], start + length


@dataclass(frozen=True)
class _Table:
    """A table of a FlatBuffer, of which every read is within the bytes."""

    data: bytes
    at: int

    def at_field(self, field: int) -> int:
        """Return where a field is; 0 if it has its default."""
        vtable = self.at - _read("<i", self.data, self.at)
        place = 4 + 2 * field
        if place + 2 > _read("<H", self.data, vtable):
            return 0
        offset = _read("<H", self.data, vtable + place)
        return self.at + offset if offset else 0

    def number(self, field: int, form: str) -> int:
        """Return a number; all defaults that are read here are 0."""
        at = self.at_field(field)
        return _read(form, self.data, at) if at else 0

    def table(self, field: int) -> "_Table":
        """Return a table."""
        return _Table(self.data, self._target(self.at_field(field)))

    def tables(self, field: int) -> list["_Table"]:
        """Return the tables of a vector."""
        start, count = self._vector(field, 4)
        places = range(start, start + 4 * count, 4)
        return [_Table(self.data, self._target(at)) for at in places]

    def structs(self, field: int, form: str) -> list[tuple[Any, ...]]:
        """Return the structures of a vector."""
        size = struct.calcsize(form)
        start, count = self._vector(field, size)
        return list(struct.iter_unpack(form, self.data[start : start + size * count]))

    def text(self, field: int) -> str:
        """Return a string."""
        start, count = self._vector(field, 1)
        return self.data[start : start + count].decode()

    def _vector(self, field: int, size: int) -> tuple[int, int]:
        if not (at := self.at_field(field)):
            return 0, 0
        start = self._target(at)
        count = _read("<I", self.data, start)
        if start + 4 + size * count > len(self.data):
            raise ValueError(f"a vector of {count} is longer than its message")
        return start + 4, count

    def _target(self, at: int) -> int:
        if not at:
            raise ValueError("a table is missing")
        return at + _read("<I", self.data, at)


def _read(form: str, data: bytes, at: int) -> int:
    if at < 0:
        raise ValueError("an offset is negative")
    return struct.unpack_from(form, data, at)[0]


def _root(message: bytes) -> _Table:
    return _Table(message, _read("<I", message, 0))


def _header(root: _Table, kind: int) -> _Table:
    found = root.number(1, "<B")
    if found != kind:
        raise ValueError(f"a message is of kind {found}, not {kind}")
    return root.table(2)


@lru_cache(maxsize=16)
def _layout(message: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return numbers per row of each array, and bits per row of each buffer."""
    root = _root(message)
    schema = _header(root, _SCHEMA)
    if root.number(3, "<q") or schema.number(0, "<h"):
        raise ValueError("its schema has a body, or other than little-endian numbers")
    multiples: list[int] = []
    bits: list[int] = []
    names: list[str] = []
    steps = False
    for field in schema.tables(1):
        names.append(field.text(0))
        _check_plain(field)
        multiple = 1
        if field.number(2, "<B") == _FIXED_SIZE_LIST:
            multiple = field.table(3).number(0, "<i")
            (child,) = field.tables(5)
            multiples.append(1)
            bits.append(0)
            _check_plain(child)
            field = child
        if multiple < 1 or field.tables(5):
            raise ValueError(f"{names[-1]!r} is a list of {multiple}, or nested")
        multiples.append(multiple)
        bits += 0, multiple * _bits(field)
        if names[-1] == "step" and multiple == 1 and bits[-1] == 32:
            steps = field.number(2, "<B") == _INT
    if not steps:
        raise ValueError("it has no column 'step' of int32")
    _check_metadata(schema, names)
    return tuple(multiples), tuple(bits)


def _check_plain(field: _Table) -> None:
    """Raise if a field has a dictionary, or is of a type that extends Arrow's."""
    if field.at_field(4) or field.at_field(6):
        raise ValueError(f"{field.text(0)!r} is no column of numbers")


def _bits(field: _Table) -> int:
    """Return the bits of one number of a column."""
    kind = field.number(2, "<B")
    if kind == _BOOL:
        return 1
    if kind == _FLOAT and 0 <= (precision := field.table(3).number(0, "<h")) <= 2:
        return _FLOAT_BITS[precision]
    if kind == _INT and (bits := field.table(3).number(0, "<i")) in (8, 16, 32, 64):
        return bits
    raise ValueError(f"{field.text(0)!r} is of an unknown type")


def _check_metadata(schema: _Table, names: list[str]) -> None:
    """Raise unless the metadata for `datasets` say that the columns are numbers.

    Others of its types read files that the metadata name.
    """
    (entry,) = schema.tables(2)
    content = json.loads(entry.text(1))
    info = content["info"]
    if entry.text(0) != "huggingface" or set(content) != {"info"}:
        raise ValueError("its metadata are not those of datasets")
    features = info["features"]
    if set(info) != {"features"} or sorted(features) != sorted(set(names)):
        raise ValueError("its metadata describe other columns")
    if len(set(names)) < len(names) or not names:
        raise ValueError("its columns are none, or share a name")
    for feature in features.values():
        inner = feature
        if feature["_type"] in ("List", "Sequence"):
            inner = feature["feature"]
        known = feature.keys() | inner.keys() <= _FEATURE_KEYS
        if not known or inner["_type"] != "Value" or type(inner["dtype"]) is not str:
            raise ValueError("its metadata describe columns that are no numbers")
