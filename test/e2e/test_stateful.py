"""Clients that send only what is new, after kill -9 and a restart."""

from __future__ import annotations

import json
from typing import Any

import pytest

from e2e.helpers import until
from e2e.talks import ChatTalk, StatefulTalk, openai_client
from e2e.worlds import INTERLEAVED, TURNS, World, next_turn_is_exact
from engram.testing.chat import NEVER_END
from engram.testing.samples import seeded_random
from refusals import refusal


def talk_of(world: World) -> StatefulTalk:
    talk = world.cases["stateful"].talk
    assert isinstance(talk, StatefulTalk)
    return talk


def test_a_stateful_turn_is_what_all_tokens_were_answered_before_the_kill(
    restarted: World,
) -> None:
    case, talk = restarted.cases["stateful"], talk_of(restarted)
    assert case.saved["turn_number"] == TURNS
    recorded = restarted.client.info(conversation_id="stateful", turn_number=TURNS)
    assert recorded["fill_ids"] == talk.ids
    next_turn_is_exact(restarted, case, "stateful")


def test_openai_clients_need_extra_body_alone(restarted: World) -> None:
    client = openai_client(restarted.client)
    said: list[Any] = [{"role": "user", "content": "one"}]
    options: dict[str, Any] = {"model": "default", "temperature": 0, "max_tokens": 8}
    extra = {"conversation_id": "openai-stateful", "stateful": True}
    whole = client.chat.completions.create(messages=said, extra_body=extra, **options)
    assert whole.usage is not None
    chunks = list(
        client.chat.completions.create(
            messages=[{"role": "user", "content": "two"}],
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
            **options,
        )
    )
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens > whole.usage.total_tokens
    assert usage.prompt_tokens_details is not None
    # All but the token that was sampled last.
    assert usage.prompt_tokens_details.cached_tokens == whole.usage.total_tokens - 1


def test_a_client_that_goes_away_leaves_the_conversation_as_it_was(restarted: World) -> None:
    http, url = restarted.client.http, "/v1/conversations/left"
    messages = [{"role": "user", "content": "a long story"}]
    first = StatefulTalk.post(restarted.client, f"{url}/chat", {"messages": messages})
    body = {
        "messages": messages,
        "max_tokens": 1500,
        "stream": True,
        "logit_bias": NEVER_END,
    }
    with http.stream("POST", f"{url}/chat", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if (
                line.startswith("data: {")
                and json.loads(line[6:])["choices"][0]["delta"]["content"]
            ):
                break
        # The reply is being written, and its beginning is here already.
        refused = restarted.client.refused(f"{url}/chat", {"messages": messages}, 409)
        assert refused["error"] == "conversation_busy"
    second = None
    while second is None:
        again = restarted.client.post(f"{url}/regenerate", {"max_tokens": 12, "temperature": 0})
        second = again.json() if again.status_code == 200 else None
        assert second is not None or refusal(again)["error"] == "conversation_busy"
    # Of the first prompt: the reply that was broken off is no turn.
    assert second["usage"]["prompt_tokens"] == first.prompt_tokens
    assert second["choices"][0]["message"]["content"] == first.output.text


def test_regenerate_goes_back_before_a_reply_of_before_the_restart(restarted: World) -> None:
    # Of which no test takes another turn.
    name = "chat-untagged"
    talk = restarted.cases[name].talk
    assert isinstance(talk, ChatTalk)
    fill = restarted.client.info(conversation_id=name, turn_number=TURNS)["fill_ids"]
    body = {"logit_bias": NEVER_END, "messages": [{"role": "user", "content": ""}]}
    prompt = fill[: -len(talk.messages[-1]["content"])]
    reply = StatefulTalk.post(
        restarted.client, f"/v1/conversations/{name}/regenerate", {"logit_bias": NEVER_END}
    )
    assert reply.prompt_tokens == len(prompt)
    plain = StatefulTalk.post(
        restarted.client, "/v1/chat/completions", {**body, "input_ids": prompt}
    )
    assert plain.tokens == reply.tokens
    saved = restarted.client.save(rid=reply.rid)
    again = restarted.client.info(conversation_id=name, turn_number=saved["turn_number"])
    assert again["fill_ids"][: len(prompt)] == prompt


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": -1},
        {"messages": [{"role": "poet", "content": "a"}]},
        {"max_tokens": 10**6},
        {"temperature": "warm"},
    ],
)
def test_what_sglang_refuses_has_the_form_of_every_error(
    restarted: World, body: dict[str, Any]
) -> None:
    said = {"messages": [{"role": "user", "content": "a"}], **body}
    url = "/v1/conversations/refused/chat"
    assert restarted.client.refused(url, said, 422)["error"] == "invalid_request"


def test_branches_and_conversations_begin_at_a_saved_turn(restarted: World) -> None:
    # Of which no test asks where it was restored from.
    source = INTERLEAVED[0]
    case, url = restarted.cases[source], "/v1/conversations"
    body = {
        "messages": [{"role": "user", "content": "elsewhere"}],
        "continue_from": {"conversation_id": source, "turn_number": TURNS},
    }
    replies = [
        StatefulTalk.post(restarted.client, f"{url}/{name}/chat", {**body, **where})
        for name, where in ((source, {"branch_name": "side"}), ("begun-there", {}))
    ]
    assert replies[0].output == replies[1].output
    assert all(reply.cached >= case.saved["token_count"] for reply in replies)
    saved = restarted.client.save(conversation_id="begun-there")
    assert saved["turn_number"] == TURNS + 1
    metadata = restarted.client.info(conversation_id="begun-there")
    assert metadata["parent_snapshot"] == case.saved["snapshot_id"]


def test_a_prefix_is_there_after_a_restart(restarted: World) -> None:
    facts = restarted.facts["prefix"]
    count = facts["made"]["token_count"]
    listed = restarted.client.http.get("/v1/prefixes").json()["prefixes"]
    assert [(one["name"], one["token_count"], one["usable"]) for one in listed] == [
        ("guide", count, True)
    ]
    assert facts["reply"].cached == count
    reply = StatefulTalk.post(restarted.client, "/v1/chat/completions", facts["body"])
    assert reply.cached == count
    assert reply.output == facts["reply"].output


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/conversations/{name}/chat"], ids=["whole", "stateful"]
)
def test_a_mark_in_a_chat_is_a_prefix(restarted: World, path: str) -> None:
    numbers = seeded_random()
    document = "".join(numbers.choices("abcdefgh ", k=80))
    part = {"type": "text", "text": document, "cache_control": {"type": "ephemeral"}}
    marked = {"role": "system", "content": [part]}
    listed = restarted.client.http.get("/v1/prefixes").json()["prefixes"]
    before = sum(one["name"].startswith("marked.") for one in listed)
    first, second = (
        StatefulTalk.post(
            restarted.client,
            path.format(name=name),
            {"messages": [marked, {"role": "user", "content": text}]},
        )
        for name, text in (("marked-1", "what is it?"), ("marked-2", "and who wrote it?"))
    )
    # The system's own token and its text; that of the user is common to what may follow or not.
    assert first.cached >= len(document) + 1
    assert second.cached == first.cached

    def stored() -> bool:
        listed = restarted.client.http.get("/v1/prefixes").json()["prefixes"]
        return sum(one["name"].startswith("marked.") for one in listed) > before

    until(stored, "the prefix is stored")
