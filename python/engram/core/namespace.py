"""The fingerprint of everything that must match before stored bytes may be used again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Final, TypeAlias

from engram.core.canonical import blake3_hex, canonical_json
from engram.errors import InvalidRequestError, NamespaceMismatchError

Scalar: TypeAlias = str | int | float | bool | None
FieldValue: TypeAlias = Scalar | Sequence[Scalar]

ABSENT: Final = "<absent>"
POOL: Final = "pool."
"""How the names of the fields begin that say what the pools hold."""
MAX_NAMESPACE_BYTES: Final = 1 << 20
"""Of the canonical form, where it is read from outside."""


class Namespace:
    """Named values (weights digest, dtypes, pool layout, page size, TP layout, ...) and their id.

    Fields are flat, so that a mismatch can name one: say ``kv.dtype``, not a nested object. Values
    are JSON scalars or lists of them. Immutable; equal exactly when the ids are.
    """

    def __init__(self, fields: Mapping[str, FieldValue]) -> None:
        """Raises `InvalidRequestError` for an unnamed field or a value JSON cannot say."""
        checked = {name: _checked(name, value) for name, value in fields.items()}
        self._fields = MappingProxyType({name: checked[name] for name in sorted(checked)})

    @property
    def fields(self) -> Mapping[str, FieldValue]:
        """The fields in order of their names; lists appear as tuples."""
        return self._fields

    @cached_property
    def canonical(self) -> bytes:
        """Canonical JSON of the fields: what the id is the digest of, and what is stored."""
        return canonical_json(dict(self._fields))

    @cached_property
    def id(self) -> str:
        """BLAKE3 of `canonical`, 64 hex digits."""
        return blake3_hex(self.canonical)

    @classmethod
    def from_canonical(cls, data: bytes) -> Namespace:
        """The reverse of `canonical`. Raises ValueError if ``data`` is not exactly that."""
        try:
            fields = json.loads(data)
            namespace = cls(fields) if isinstance(fields, dict) else None
        except (InvalidRequestError, RecursionError) as error:
            raise ValueError(f"not a namespace: {error}") from None
        if namespace is None or namespace.canonical != data:
            raise ValueError("not a namespace in canonical JSON")
        return namespace

    def difference(self, found: Namespace) -> list[tuple[str, FieldValue, FieldValue]]:
        """``(field, wanted, found)`` of every field that differs, by name; `ABSENT` if missing.

        ``self`` is what the server wants, ``found`` what the bytes were made with.
        """
        names = sorted(self._fields.keys() | found._fields.keys())
        pairs = ((n, self._fields.get(n, ABSENT), found._fields.get(n, ABSENT)) for n in names)
        # Compared as JSON, because to Python 1 == True == 1.0.
        return [(n, w, f) for n, w, f in pairs if canonical_json(w) != canonical_json(f)]

    def require(self, found: Namespace) -> None:
        """Raise `NamespaceMismatchError` for the first differing field; details list them all.

        One that says what is in the pools is named only where no other differs: their shapes follow
        from the model and from the number of ranks, which are the reason then.
        """
        differences = self.difference(found)
        if not differences:
            return
        reasons = [one for one in differences if not one[0].startswith(POOL)]
        error = NamespaceMismatchError.of(*(reasons or differences)[0])
        error.details["differences"] = [list(difference) for difference in differences]
        raise error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Namespace) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"Namespace({self.id[:12]}, {len(self._fields)} fields)"


def _checked(name: object, value: object) -> FieldValue:
    if not isinstance(name, str) or not name:
        raise InvalidRequestError(f"a namespace field needs a name, not {name!r}")
    items = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(item is None or isinstance(item, (str, int, float, bool)) for item in items):
        raise InvalidRequestError(
            f"namespace field {name!r} must be text, a number, a bool, null or a list of those",
            details={"field": name},
        )
    checked: FieldValue = items if isinstance(value, (list, tuple)) else items[0]
    try:
        canonical_json([name, checked])
    except ValueError as error:
        raise InvalidRequestError(
            f"namespace field {name!r}: {error}", details={"field": name}
        ) from None
    return checked
