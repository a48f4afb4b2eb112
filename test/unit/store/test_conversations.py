"""Records of what was set of conversations."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.snapshot.conversation import (
    ConversationRecord,
    decode_conversation,
    encode_conversation,
)
from engram.snapshot.envelope import seal_record
from engram.store.disk import DiskStore
from engram.store.layout import Layout

ids = st.from_regex(r"[A-Za-z0-9_:-][A-Za-z0-9._:-]{0,20}", fullmatch=True)


def record(name: str = "a", priority: int = 80, tenant: str = "") -> ConversationRecord:
    return ConversationRecord(tenant=tenant, conversation_id=name, priority=priority)


@given(ids | st.just(""), ids, st.integers(0, 100))
def test_every_record_comes_back(tenant: str, name: str, priority: int) -> None:
    one = record(name, priority, tenant)
    assert decode_conversation(encode_conversation(one)) == one


BODY = {"version": 1, "tenant": "", "conversation_id": "a", "priority": 80}


@pytest.mark.parametrize(
    "changes",
    [
        {"priority": 101},
        {"priority": -1},
        {"priority": True},
        {"priority": 80.0},
        {"priority": "80"},
        {"priority": 2**70},
        {"conversation_id": "../a"},
        {"conversation_id": ""},
        {"tenant": "a/b"},
        {"more": 1},
        {"version": 2},
        {"version": True},
    ],
    ids=str,
)
def test_what_is_not_one_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"Input should|Extra|String should|canonical form"):
        decode_conversation(seal_record({**BODY, **changes}))


@pytest.mark.parametrize("missing", BODY)
def test_every_field_is_needed(missing: str) -> None:
    with pytest.raises(ValueError, match=r"required|canonical form"):
        decode_conversation(seal_record({n: v for n, v in BODY.items() if n != missing}))


def test_a_flipped_bit_is_seen() -> None:
    data = encode_conversation(record())
    for position in range(len(data) * 8):
        changed = bytearray(data)
        changed[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError, match=r"not |digest"):
            decode_conversation(bytes(changed))


def test_a_store_keeps_the_newest_of_each(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path) as store:
        assert list(store.iter_conversations()) == []
        for one in (record("a", 10), record("b", 20), record("a", 30), record("a", 40, "tenant")):
            store.put_conversation(one)
        store.delete_conversation(record("b"))
        store.delete_conversation(record("never"))
    with DiskStore.open(tmp_path) as store:
        found = {
            (one.tenant, one.conversation_id, one.priority) for one in store.iter_conversations()
        }
        assert found == {("", "a", 30), ("tenant", "a", 40)}


def test_damage_is_moved_aside_and_a_newer_version_is_left(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    with DiskStore.open(tmp_path) as store:
        for name in "abc":
            store.put_conversation(record(name))
        whole = layout.conversation(record("a").name)
        layout.conversation(record("b").name).write_bytes(whole.read_bytes())
        newer = layout.conversation(record("c").name)
        newer.write_bytes(seal_record({"version": 2, "priorities": []}))
        assert [one.conversation_id for one in store.iter_conversations()] == ["a"]
        assert store.health().quarantined == 1
        assert newer.exists()
