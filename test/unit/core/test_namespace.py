"""Namespaces: identity, difference, and the error that names a field."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.core.namespace import ABSENT, Namespace
from engram.errors import InvalidRequestError, NamespaceMismatchError

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
)
FIELDS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10),
    SCALARS | st.lists(SCALARS, max_size=4),
    max_size=6,
)


@given(FIELDS)
def test_a_namespace_comes_back_from_its_canonical_form(fields: dict) -> None:
    namespace = Namespace(fields)
    again = Namespace.from_canonical(namespace.canonical)
    assert again == namespace
    assert again.id == namespace.id
    assert namespace.difference(again) == []
    namespace.require(again)


@given(FIELDS)
def test_order_does_not_matter(fields: dict) -> None:
    assert Namespace(dict(reversed(fields.items()))).id == Namespace(fields).id


@given(FIELDS, FIELDS)
def test_ids_differ_exactly_when_there_is_a_difference(left: dict, right: dict) -> None:
    assert (Namespace(left).id == Namespace(right).id) == (
        Namespace(left).difference(Namespace(right)) == []
    )


def test_the_id_is_stable() -> None:
    # Stored bytes are found by it: a change here orphans every snapshot there is.
    namespace = Namespace({"page_size": 1, "kv.dtype": "BF16", "layers": [0, 2], "tied": True})
    assert namespace.canonical == b'{"kv.dtype":"BF16","layers":[0,2],"page_size":1,"tied":true}'
    assert namespace.id == "15e49bf48824a4412b6f30aea982819079cba78d1d129676052e969892ace228"


def test_the_first_differing_field_is_named_with_both_values() -> None:
    wanted = Namespace({"kv.dtype": "BF16", "page_size": 1, "tp": 2, "extra": None})
    found = Namespace({"kv.dtype": "F8_E4M3", "page_size": 16, "tp": 2, "old": "x"})
    with pytest.raises(NamespaceMismatchError, match=r"'extra'") as caught:
        wanted.require(found)
    assert caught.value.details["differences"] == [
        ["extra", None, ABSENT],
        ["kv.dtype", "BF16", "F8_E4M3"],
        ["old", ABSENT, "x"],
        ["page_size", 1, 16],
    ]
    assert caught.value.details["wanted"] is None
    assert caught.value.details["found"] == ABSENT
    json.dumps(caught.value.to_dict())


def test_the_number_of_ranks_is_the_reason_for_other_pools() -> None:
    """By their names the shapes would come first, which an operator cannot make sense of."""
    two = Namespace({"page_size": 1, "pool.k.1": "F32[1, 32]", "tp_size": 2, "zone": "a"})
    one = Namespace({"page_size": 1, "pool.k.1": "F32[2, 32]", "tp_size": 1, "zone": "a"})
    with pytest.raises(
        NamespaceMismatchError, match=r"'tp_size': this server has 1, .* 2 "
    ) as caught:
        one.require(two)
    assert caught.value.details["field"] == "tp_size"
    assert [name for name, _, _ in caught.value.details["differences"]] == ["pool.k.1", "tp_size"]
    other = Namespace({**one.fields, "pool.k.1": "BF16[2, 32]"})
    with pytest.raises(NamespaceMismatchError, match=r"'pool.k.1'"):
        one.require(other)


@pytest.mark.parametrize(("left", "right"), [(1, True), (1, 1.0), (0, False), ([1], 1)])
def test_values_python_calls_equal_are_told_apart(left: object, right: object) -> None:
    one, other = Namespace({"field": left}), Namespace({"field": right})  # type: ignore[dict-item]
    assert one.id != other.id
    assert [name for name, _, _ in one.difference(other)] == ["field"]


@pytest.mark.parametrize(
    "fields",
    [
        {"a": float("nan")},
        {"a": float("inf")},
        {"a": {"nested": 1}},
        {"a": [[1]]},
        {"a": b"bytes"},
        {"a": "\ud800"},
        {"": 1},
        {1: 1},
        {"b": 1, 1: 1},
    ],
    ids=repr,
)
def test_what_has_no_canonical_form_is_refused(fields: dict) -> None:
    with pytest.raises(InvalidRequestError, match="namespace field"):
        Namespace(fields)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"a": 1}',
        b'{"b":1,"a":1}',
        b'{"a":1,"a":1}',
        b'{"a":{}}',
        b'{"a":NaN}',
        b"\xff",
        b'{"a":1}\n',
        b"[" * 100_000,
        b"1" * 5000,
    ],
    ids=lambda data: repr(data[:12]),
)
def test_bytes_that_are_no_namespace_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Namespace.from_canonical(data)


def test_a_namespace_does_not_change() -> None:
    layers = [1, 2]
    namespace = Namespace({"layers": layers})
    layers.append(3)
    assert namespace.fields["layers"] == (1, 2)
    with pytest.raises(TypeError):
        namespace.fields["layers"] = 1  # type: ignore[index]
    assert len({namespace, Namespace({"layers": (1, 2)})}) == 1
