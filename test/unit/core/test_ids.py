"""Ids: what is accepted, what is refused, and what we make ourselves."""

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.core.ids import MAX_ID_LENGTH, check_id, check_tenant, new_snapshot_id
from engram.errors import InvalidIdError

ALPHABET = string.ascii_letters + string.digits + "._:-"


@given(st.text(ALPHABET, min_size=1, max_size=MAX_ID_LENGTH).filter(lambda t: t[0] != "."))
def test_valid_ids_pass_unchanged(text: str) -> None:
    assert check_id("conversation_id", text) == text


@pytest.mark.parametrize(
    "value",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "../a",
        "a b",
        "a\n",
        "\na",
        "a\0",
        "é",
        "\u0661",  # an Arabic digit one, which \d would accept
        "a" * (MAX_ID_LENGTH + 1),
        None,
        1,
        b"abc",
        ["a"],
    ],
    ids=repr,
)
def test_bad_ids_are_refused_by_field(value: object) -> None:
    with pytest.raises(InvalidIdError, match="branch_name") as caught:
        check_id("branch_name", value)
    assert caught.value.details == {"field": "branch_name"}
    assert caught.value.http_status == 422
    assert len(caught.value.message) < 200


@given(st.text(max_size=300))
def test_a_check_agrees_with_the_rule_as_written(text: str) -> None:
    valid = re.fullmatch(r"[A-Za-z0-9._:-]{1,255}", text, re.ASCII) and not text.startswith(".")
    if valid:
        assert check_id("id", text) == text
    else:
        with pytest.raises(InvalidIdError):
            check_id("id", text)


def test_the_tenant_may_be_empty() -> None:
    assert check_tenant("") == ""
    assert check_tenant("team-1") == "team-1"
    with pytest.raises(InvalidIdError, match="tenant"):
        check_tenant("a b")


def test_made_ids_are_valid_sortable_and_different() -> None:
    ids = [new_snapshot_id(now=1_700_000_000 + second / 1000) for second in range(200)]
    assert ids == sorted(ids)
    assert all(re.fullmatch(r"snap-[0-9A-HJKMNP-TV-Z]{26}", check_id("id", i)) for i in ids)
    assert len({new_snapshot_id(now=0) for _ in range(1000)}) == 1000


def test_a_made_id_holds_its_time() -> None:
    now = 1_700_000_000.123
    alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    value = 0
    for character in new_snapshot_id(now)[len("snap-") :][:10]:
        value = value * 32 + alphabet.index(character)
    assert value == 1_700_000_000_123
