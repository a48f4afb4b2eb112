"""Ways to change files: bytes as disks and attackers change them, JSON by its structure.

Every function takes a random generator and returns something new; nothing is changed in place.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

Mutator: TypeAlias = Callable[[random.Random, bytes, Sequence[bytes]], bytes]
"""Generator, a file, other files of the same store."""

PAGE: Final = 4096
EXTREMES: Final = (
    *(0, 1, -1, 2, 63, 64, 65, 4095, 4096, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32),
    *(2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**30, 10**400),
)


def _place(rng: random.Random, data: bytes) -> int:
    """Anywhere, beginning and end more often: there is what matters, between them mostly zeros."""
    if not data:
        return 0
    near = min(len(data), 600)
    return rng.choice(
        (rng.randrange(len(data)), rng.randrange(near), len(data) - 1 - rng.randrange(near))
    )


def _flip(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if out:
            out[_place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _overwrite(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    place, count = _place(rng, data), rng.choice((1, 2, 4, 8, 64))
    return data[:place] + rng.randbytes(count) + data[place + count :]


def _number(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """An extreme where a length, a version or a count may lie."""
    form = rng.choice(("<I", "<Q", ">I"))
    size = struct.calcsize(form)
    value = rng.choice(EXTREMES) % (1 << 8 * size)
    place = rng.randrange(0, max(1, min(len(data) - size, 128)), 4)
    return data[:place] + struct.pack(form, value) + data[place + size :]


def _cut(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data[: rng.choice((_place(rng, data), max(0, len(data) - rng.randrange(1, 70))))]


def _behead(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data[_place(rng, data) + 1 :]


def _extend(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    count = rng.choice((1, 15, 16, 32, 512, PAGE))
    return data + rng.choice((bytes(count), rng.randbytes(count), data[:count], b"\n" * count))


def _zero_pages(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    size = rng.choice((512, PAGE))
    first = rng.randrange(len(data) // size + 1) * size
    count = min(size * rng.randrange(1, 3), max(0, len(data) - first))
    return data[:first] + bytes(count) + data[first + count :]


def _splice(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others)
    place = _place(rng, data)
    return data[:place] + other[place if rng.random() < 0.7 else _place(rng, other) :]


def _move(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A block taken from one place and put into another, or there twice."""
    size = rng.choice((1, 16, 32, 512, 528, PAGE))
    source, target = _place(rng, data), _place(rng, data)
    block = data[source : source + size]
    rest = data if rng.random() < 0.5 else data[:source] + data[source + size :]
    return rest[:target] + block + rest[target:]


def _other(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return rng.choice(others)


def _noise(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return rng.choice((b"", rng.randbytes(rng.randrange(9000)), data[:20] + rng.randbytes(5000)))


BYTES: Final[dict[str, Mutator]] = {
    "bits flipped": _flip,
    "bytes overwritten": _overwrite,
    "number made extreme": _number,
    "cut": _cut,
    "beginning cut": _behead,
    "extended": _extend,
    "pages zeroed": _zero_pages,
    "spliced": _splice,
    "block moved": _move,
    "another file": _other,
    "noise": _noise,
}

# ---- JSON ----

_RAW: Final = "\x01raw\x01"


def mutate_json(rng: random.Random, value: Any) -> tuple[str, bytes]:
    """What was done, and the text of a changed value; canonical but for what was done to it."""
    changed = copy.deepcopy(value)
    how, changed, raw = rng.choice(STRUCTURE)(rng, changed)
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        if raw is None and isinstance(changed, (dict, list)):
            also, changed, raw = rng.choice(STRUCTURE)(rng, changed)
            how = f"{how}, {also}"
    text = dumps(changed)
    if raw is not None:
        text = text.replace(json.dumps(_RAW).encode(), raw)
    if rng.random() < 0.15:
        name, respell = rng.choice(SPELLINGS)
        return f"{how}, {name}", respell(rng, text)
    return how, text


def dumps(value: Any) -> bytes:
    """Canonical JSON, but of anything that Python can say as JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


Structural: TypeAlias = Callable[[random.Random, Any], tuple[str, Any, bytes | None]]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything inside."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        found.append((value, key))
        if isinstance(inner, (dict, list)):
            found += _places(inner)
    return found


def _pick(rng: random.Random, value: Any) -> tuple[Any, Any] | None:
    places = _places(value)
    return rng.choice(places) if places else None


def _scalar(rng: random.Random) -> Any:
    return rng.choice(
        (
            rng.choice(EXTREMES),
            rng.choice((0.5, -0.0, 5.0, 1e308, 1e-320, float("inf"), float("nan"))),
            rng.choice(("", "a" * 5000, "\0", "é", "\ud800", "../../etc", "AB" * 32, "ab" * 32)),
            rng.choice((True, False, None)),
            rng.choice(([], {}, [[]], [None], {"": None}, [1] * 3000)),
        )
    )


def _replace(rng: random.Random, value: Any) -> tuple[str, Any, bytes | None]:
    where = _pick(rng, value)
    if where is None:
        return "replaced whole", _scalar(rng), None
    where[0][where[1]] = _scalar(rng)
    return "value replaced", value, None


def _nudge(rng: random.Random, value: Any) -> tuple[str, Any, bytes | None]:
    """A number changed a little or a lot: lengths, offsets, shapes, counts."""
    numbers = [(c, k) for c, k in _places(value) if type(c[k]) in (int, float)]
    if numbers:
        container, key = rng.choice(numbers)
        change = rng.choice((1, -1, 4, 64, -64, 4096, 2**20, 2**32, 2**40))
        container[key] = rng.choice(
            (container[key] + change, container[key] * 2, container[key] * -1, change)
        )
    return "number changed", value, None


def _remove(rng: random.Random, value: Any) -> tuple[str, Any, bytes | None]:
    where = _pick(rng, value)
    if where is not None:
        del where[0][where[1]]
    return "removed", value, None


def _add(rng: random.Random, value: Any) -> tuple[str, Any, bytes | None]:
    where = _pick(rng, value)
    if where is not None:
        container, key = where
        if isinstance(container, dict):
            container[rng.choice(("more", "", "x" * 300, f"{key}2"))] = _scalar(rng)
        else:
            container.insert(key, copy.deepcopy(container[key]))
    return "added", value, None


def _exchange(rng: random.Random, value: Any) -> tuple[str, Any, bytes | None]:
    places = _places(value)
    if len(places) > 1:
        (one, key), (other, name) = rng.sample(places, 2)
        a, b = copy.deepcopy(one[key]), copy.deepcopy(other[name])
        one[key] = b
        if isinstance(other, dict) or name < len(other):
            other[name] = a
    return "values exchanged", value, None


def _reverse(rng: random.Random, value: Any) -> tuple[str, Any, bytes | None]:
    lists = [c[k] for c, k in _places(value) if isinstance(c[k], list)]
    if lists:
        rng.choice(lists).reverse()
    return "list reversed", value, None


def _character(rng: random.Random, value: Any) -> tuple[str, Any, bytes | None]:
    texts = [(c, k) for c, k in _places(value) if isinstance(c[k], str) and c[k]]
    if texts:
        container, key = rng.choice(texts)
        text, place = container[key], rng.randrange(len(container[key]))
        container[key] = text[:place] + rng.choice("0af.:/ \nZ\u0660é") + text[place + 1 :]
    return "character changed", value, None


def _product(rng: random.Random, value: Any) -> tuple[str, Any, bytes | None]:
    """A shape whose size no machine number holds, or that has another size than its length."""
    lists = [(c, k) for c, k in _places(value) if isinstance(c[k], list)]
    if lists:
        container, key = rng.choice(lists)
        container[key] = rng.choice(
            (
                [2**53 - 1] * 8,
                [2**32, 2**32],
                [2**31, 2**33, 0],
                [1] * 9,
                [0],
                [-1, -1],
                [2**16] * 4,
            )
        )
    return "shape overflowing", value, None


def _deep(rng: random.Random, value: Any) -> tuple[str, Any, bytes | None]:
    depth = rng.choice((10, 120, 250, 500, 900, 2000, 100_000))
    begin, end = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    raw = begin * depth + b"1" + end * depth
    where = _pick(rng, value)
    if where is None:
        return "nested deep", _RAW, raw
    where[0][where[1]] = _RAW
    return "nested deep", value, raw


def _literal(rng: random.Random, value: Any) -> tuple[str, Any, bytes | None]:
    """What a JSON text may have and `json.dumps` never writes."""
    raw = rng.choice(
        (b"1" * 5000, b"1e999", b"-0", b"1E2", b"0x10", b"1.", b"'a'", b'"\xff"', b'"\\ud800"', b"")
    )
    where = _pick(rng, value)
    if where is None:
        return "odd literal", _RAW, raw
    where[0][where[1]] = _RAW
    return "odd literal", value, raw


def _twice(rng: random.Random, value: Any) -> tuple[str, Any, bytes | None]:
    """A key that is there twice, with the same value or another."""
    dicts = [(c, k) for c, k in _places(value) if isinstance(c, dict) and isinstance(k, str)]
    if not dicts:
        return "key twice", value, None
    container, key = rng.choice(dicts)
    first, second = dumps(container[key]), dumps(rng.choice((container[key], _scalar(rng))))
    container[key] = _RAW
    return "key twice", value, first + b"," + json.dumps(key).encode() + b":" + second


STRUCTURE: Final[tuple[Structural, ...]] = (
    *(_replace, _nudge, _remove, _add, _exchange, _reverse, _character, _product, _deep),
    *(_literal, _twice),
)


def _spaces(rng: random.Random, text: bytes) -> bytes:
    return text.replace(b",", b", ", 1)


def _float(rng: random.Random, text: bytes) -> bytes:
    return text.replace(b":1,", b":1.0,", 1)


def _escape(rng: random.Random, text: bytes) -> bytes:
    return text.replace(b'"n', b'"\\u006e', 1)


def _encoding(rng: random.Random, text: bytes) -> bytes:
    plain = text.decode("utf-8", "replace")
    return rng.choice((b"\xef\xbb\xbf" + text, plain.encode("utf-16"), plain.encode("utf-32")))


SPELLINGS: Final[tuple[tuple[str, Callable[[random.Random, bytes], bytes]], ...]] = (
    ("a space", _spaces),
    ("another number form", _float),
    ("an escape", _escape),
    ("another encoding", _encoding),
)
