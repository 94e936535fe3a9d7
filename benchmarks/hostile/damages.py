"""Ways in which a file gets damaged, at random: bits, bytes, what its header says, what its JSON
says. Functions of a `random.Random` alone, so that a number names a damage."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable

ODD = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2.5,
    10**7,
    2**31,
    2**63,
    10**40,
    "",
    "x",
    "3",
    "٣",
    "a" * 5000,
    "\n",
    "\ud800",
    [],
    {},
    [[]],
    [1, 2],
    {"a": 1},
    "../x.safetensors",
    "/etc/passwd",
)
RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "[" * 20000 + "]" * 20000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "9" * 5000,
)
"""what no JSON writer writes"""
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F4",
    "F8_E8M0",
    "X",
    7,
)
MARK = "\0here\0"
Damage = Callable[[bytes, random.Random], bytes]


def flip_bit(content: bytes, draw: random.Random) -> bytes:
    return _flipped(content, draw.randrange(len(content)), draw)


def flip_in_header(content: bytes, draw: random.Random) -> bytes:
    return _flipped(content, draw.randrange(min(len(content), 4096)), draw)


def truncate(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def extend(content: bytes, draw: random.Random) -> bytes:
    return content + draw.randbytes(draw.choice((1, 7, 8, 4096)))


def overwrite(content: bytes, draw: random.Random) -> bytes:
    first, size = draw.randrange(len(content)), draw.choice((1, 8, 64, 512))
    return content[:first] + draw.randbytes(size)[: len(content) - first] + content[first + size :]


def zero_page(content: bytes, draw: random.Random) -> bytes:
    first = draw.randrange(len(content)) // 512 * 512
    return content[:first] + bytes(min(512, len(content) - first)) + content[first + 512 :]


def move(content: bytes, draw: random.Random) -> bytes:
    """Two pieces of one length change places."""
    size = draw.choice((4, 32, 256))
    a, b = sorted(draw.randrange(max(1, len(content) - size)) for _ in range(2))
    if b - a < size:
        return flip_bit(content, draw)
    return (
        content[:a]
        + content[b : b + size]
        + content[a + size : b]
        + content[a : a + size]
        + content[b + size :]
    )


BYTES: tuple[Damage, ...] = (
    flip_bit,
    flip_bit,
    flip_in_header,
    truncate,
    extend,
    overwrite,
    zero_page,
    move,
)


def change_json(content: bytes, draw: random.Random) -> bytes:
    """One value, or one name, of a JSON text."""
    value = json.loads(content)
    places = list(_places(value))
    if not places or draw.random() < 0.05:
        return draw.choice(RAW).encode() if draw.random() < 0.3 else _dumped(draw.choice(ODD))
    parent, key = draw.choice(places)
    kind = draw.randrange(5)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[draw.choice(("x", "config", "a" * 300, "format"))] = draw.choice(ODD)
    elif kind == 2:
        parent[key] = MARK
        return _dumped(value).replace(_dumped(MARK), draw.choice(RAW).encode(), 1)
    elif kind == 3 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
        parent[key] = parent[key] + draw.choice((-1, 1, 100, -1000, 1e300))
    else:
        parent[key] = draw.choice(ODD)
    return _dumped(value)


def change_line(content: bytes, draw: random.Random) -> bytes:
    """One line of a file of JSON lines."""
    lines = content.splitlines(True)
    place = draw.randrange(len(lines))
    lines[place] = change_json(lines[place], draw) + b"\n"
    return b"".join(lines)


def change_header(content: bytes, draw: random.Random) -> bytes:
    """Changes the header of a safetensors file, the metadata included; the tensors' bytes stay."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    kind = draw.randrange(8)
    if kind == 0 and len(names) > 1:
        a, b = draw.sample(names, 2)
        header[a], header[b] = header[b], header[a]
    elif kind == 1 and names:
        header[draw.choice(names)]["dtype"] = draw.choice(DTYPES)
    elif kind == 2 and names:
        header[draw.choice(names)]["shape"] = draw.choice(
            ([], [1], [-1], [2**63], [0], "x", [[]], [1] * 99, [3, 4])
        )
    elif kind == 3 and names:
        header[draw.choice(names)]["data_offsets"] = draw.choice(
            ([0, 0], [4, 0], [0, 2**63], [0, 4], "x", [0], [True, 8])
        )
    elif kind == 4 and names:
        name = draw.choice(names)
        header[draw.choice(("x", name + "x", draw.choice(names), "\n", ""))] = header.pop(name)
    elif kind == 5 and names:
        del header[draw.choice(names)]
    elif kind == 6 and header.get("__metadata__"):
        return _with_metadata(header, data, draw)
    else:
        return _joined(change_json(json.dumps(header).encode(), draw), data)
    return _joined(_dumped(header), data)


def _with_metadata(header: dict, data: bytes, draw: random.Random) -> bytes:
    """Another value in one of its JSON texts, or in the place of one."""
    metadata = header["__metadata__"]
    key = draw.choice(list(metadata))
    try:
        metadata[key] = change_json(metadata[key].encode(), draw).decode("utf-8", "surrogatepass")
    except ValueError:
        metadata[key] = draw.choice(("", "x", "-1", "٣", "[" * 20000, "null"))
    return _joined(_dumped(header), data)


def damage_of(name: str, content: bytes, draw: random.Random) -> tuple[str, bytes]:
    """(what was done, the file)"""
    kinds: list[Damage] = list(BYTES)
    if name.endswith(".safetensors"):
        kinds += [change_header] * 8
    elif name.endswith((".json", ".jsonl")):
        kinds += [change_json if name.endswith(".json") else change_line] * 12
    chosen = draw.choice(kinds)
    return chosen.__name__, chosen(content, draw)


def _flipped(content: bytes, place: int, draw: random.Random) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def _places(value):
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in children:
        yield value, key
        yield from _places(child)


def _dumped(value) -> bytes:
    return json.dumps(value).encode()


def _joined(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data
