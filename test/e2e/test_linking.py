"""Memory with no change to the client, before and after kill -9."""

from __future__ import annotations

from e2e.helpers import random_text
from e2e.small_world import Linked
from e2e.worlds import World
from engram.testing.samples import seeded_random


def test_an_untagged_chat_is_the_next_turn_of_what_it_extends(small: World) -> None:
    linked: Linked = small.facts["linked"]
    client, numbers = small.client, seeded_random()
    name = linked.saved["conversation_id"]
    assert name.startswith("linked-")
    assert linked.saved["turn_number"] == 2
    assert linked.replies[1].cached >= linked.replies[0].prompt_tokens
    before = client.info(conversation_id=name)["fill_ids"]
    # After the restart, and once more from memory.
    for turn in (3, 4):
        said = list(linked.talk.messages)
        reply = linked.talk.say(client, random_text(numbers, 20), None)
        assert reply.cached >= len(before) - 1
        saved = client.save(rid=reply.rid)
        assert (saved["conversation_id"], saved["turn_number"]) == (name, turn)
        now = client.info(conversation_id=name)["fill_ids"]
        # But for the token that ends a reply, which may be the template's.
        assert now[: len(before) - 1] == before[:-1]
        before = now
    # An edited history, and an older turn taken up again, begin conversations of their own.
    names = {name}
    for messages in (
        [{"role": "user", "content": "other " + said[0]["content"]}, *said[1:]],
        said[:2],
    ):
        linked.talk.messages = messages
        reply = linked.talk.ask(client, random_text(numbers, 20), None)
        other = client.save(rid=reply.rid)
        assert other["conversation_id"].startswith("linked-")
        assert (other["conversation_id"] in names, other["turn_number"]) == (False, 1)
        names.add(other["conversation_id"])
