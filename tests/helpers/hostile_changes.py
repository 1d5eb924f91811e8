"""Changes of a store's files whose checksums fit, as an attacker makes them."""

import copy
import json
import struct

import xxhash

from tests.helpers.stores import read_lines, write_lines

_EDGES = [0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, -(2**63)]
_VALUES = [
    *_EDGES,
    *(10**10, 10**9, 10**30, 0.5, 1e308, float("nan"), float("inf")),
    *(None, True, "", "../../x", "\x1b[2J", "a" * 5000, "9" * 5000),
    *([], [[]], {}, [None] * 3, {"a": {}}),
]
_DEEP = "@deep@"


def _nodes(tree, found):
    """Every place in a tree of JSON: its container and its key."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        found.append((tree, key))
        if isinstance(tree[key], dict | list):
            _nodes(tree[key], found)
    return found


def change_tree(tree, rng):
    """Change some places of a tree of JSON."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if nodes := _nodes(tree, []):
            rng.choice(_CHANGES)(*rng.choice(nodes), nodes, rng)


def _replace(holder, key, nodes, rng):
    holder[key] = copy.deepcopy(rng.choice(_VALUES))


def _delete(holder, key, nodes, rng):
    del holder[key]


def _swap(holder, key, nodes, rng):
    other, place = rng.choice(nodes)
    mine, theirs = copy.deepcopy(holder[key]), copy.deepcopy(other[place])
    other[place] = mine
    if isinstance(holder, list) or key in holder:
        holder[key] = theirs


def _nest(holder, key, nodes, rng):
    holder[key] = rng.choice([_DEEP, [holder[key]], {"a": holder[key]}])


def _add(holder, key, nodes, rng):
    if isinstance(holder, dict):
        name = rng.choice(["kind", "file", "extra", "\x1b"])
        holder[name] = copy.deepcopy(rng.choice(_VALUES))


def _repeat(holder, key, nodes, rng):
    if isinstance(holder[key], list | str):
        holder[key] = holder[key] * rng.choice([2, 10, 500])


_CHANGES = [_replace, _replace, _replace, _delete, _swap, _nest, _add, _repeat]


def deepened(text):
    return text.replace(f'"{_DEEP}"', "[" * 50_000 + "]" * 50_000)


def change_bytes(data, rng):
    """Flip, overwrite, cut or lengthen bytes."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(data))
        what = rng.randrange(6)
        if what < 2:
            data[at] ^= 1 << rng.randrange(8)
        elif what == 2:
            data[at] = rng.choice([0, 0xFF, 0x7F, 0x80])
        elif what == 3:
            del data[at : at + rng.choice([1, 4, 8, 64])]
        elif what == 4:
            data[at:at] = bytes(rng.choice([1, 4, 8, 64]))
        else:
            data = data[: 1 + at]
    return bytes(data)


def change_head(data, rng):
    """Put numbers at their edges into the head of an Arrow file."""
    data = bytearray(data)
    head = len(data) if rng.random() < 0.1 else min(len(data), 2300)
    for _ in range(rng.choice([1, 1, 2, 3])):
        form = rng.choice("bhiqq")
        size = struct.calcsize(form)
        at = rng.randrange(0, head - size) // size * size
        low, high = -(2 ** (8 * size - 1)), 2 ** (8 * size - 1) - 1
        near = struct.unpack_from("<" + form, data, at)[0] + rng.choice([-8, -1, 1, 8])
        value = rng.choice([*_EDGES, 2, 3, 6, 16, near, rng.randint(low, high)])
        struct.pack_into("<" + form, data, at, max(low, min(high, value)))
    return bytes(data)


def claim_rows(data, rows, claimed):
    """Replace a number of rows wherever the head has it."""
    return data.replace(struct.pack("<q", rows), struct.pack("<q", claimed))


def seal(path, text):
    """Write a sealed JSON file."""
    zeros = "0" * 32
    text = '{\n "xxh3_128": "' + zeros + '",' + text.lstrip()[1:]
    digest = xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
    path.write_text(text.replace(zeros, digest, 1), errors="surrogatepass")


def change_sealed(path, rng):
    """Change a sealed JSON file, and seal it again."""
    content = json.loads(path.read_text())
    del content["xxh3_128"]
    if rng.random() < 0.7:
        change_tree(content, rng)
        return seal(path, deepened(json.dumps(content, indent=1)))
    data = change_bytes(json.dumps(content).encode(), rng)
    return seal(path, data.decode("utf-8", "replace"))


def change_log(path, rng):
    """Change a log, whose lines are chained again."""
    contents = read_lines(path)
    if rng.random() < 0.3:
        path.write_bytes(change_bytes(path.read_bytes(), rng))
        return
    if rng.random() < 0.2:
        rng.shuffle(contents)
    change_tree(contents, rng)
    try:
        write_lines(path, [c for c in contents if isinstance(c, dict)])
    except (ValueError, UnicodeError):
        path.write_bytes(b"")
    if rng.random() < 0.1:
        _chain(path, deepened(path.read_text()))


def _chain(path, text):
    """Chain lines again whose text was changed."""
    written, digest = b"", b""
    for line in text.encode().splitlines(True):
        size = len(line)
        blank = b'{"bytes":%10d,"xxh3_128":"%s",' % (size, b"0" * 32) + line[66:]
        digest = xxhash.xxh3_128_hexdigest(digest + blank).encode()
        written += blank.replace(b"0" * 32, digest, 1)
    path.write_bytes(written)


def change_rows(store, rng):
    """Change an Arrow file; the manifest says what the file then has."""
    path = store / "manifest-00000.jsonl"
    contents = read_lines(path)
    entry = rng.choice(rng.choice(contents[1:])["shards"])
    kind, number, rows, *_ = entry
    file = store / f"{kind}-00000-{number:06d}.arrow"
    data = file.read_bytes()
    what = rng.random()
    if what < 0.15:
        entry[2] = rng.choice([3, 8, 100, 10**6, 2**40, 2**53])
        data = claim_rows(data, rows, entry[2])
    elif what < 0.75:
        data = change_head(data, rng)
    else:
        data = change_bytes(data, rng)
    file.write_bytes(data)
    entry[5] = len(data)
    if rng.random() < 0.1:
        entry[6] = rng.randrange(0, len(data) + 8)
    entry[7] = xxhash.xxh3_128_hexdigest(data[: entry[6]])
    entry[8] = xxhash.xxh3_128_hexdigest(data)
    write_lines(path, contents)


def make_hostile(store, rng):
    """Change a file of a store."""
    what = rng.random()
    if what < 0.3:
        change_sealed(store / "header.json", rng)
    elif what < 0.55:
        for path in store.glob("manifest-*"):
            change = change_log if path.suffix == ".jsonl" else change_sealed
            change(path, rng)
    elif (store / "manifest-00000.jsonl").exists():
        change_rows(store, rng)
    else:
        change_sealed(store / "manifest-00000.json", rng)
