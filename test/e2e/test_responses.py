"""`/v1/responses` with `previous_response_id`, on a server that was killed in between."""

from __future__ import annotations

import pytest

from e2e.responses import Responses, fetch, respond, said
from e2e.worlds import World


@pytest.fixture
def kept(small: World) -> Responses:
    found = small.facts["responses"]
    assert isinstance(found, Responses)
    return found


def test_what_was_kept_is_fetched_as_it_was(small: World, kept: Responses) -> None:
    assert len(kept.fetched) == 5
    for response_id, before in kept.fetched.items():
        assert fetch(small.client, response_id) == before


@pytest.mark.parametrize("name", ["second", "streamed", "in the background", "called"])
def test_a_reply_goes_on_from_one_before_the_kill(small: World, kept: Responses, name: str) -> None:
    body, before = kept.next[name]
    assert said(respond(small.client.url, **body)) == said(before)


def test_what_was_not_to_be_kept_is_gone(small: World, kept: Responses) -> None:
    for response_id in (*kept.unkept, "resp_never"):
        response = small.client.http.get(f"/v1/responses/{response_id}")
        assert response.status_code == 404, response.text
    body = {"input": "a", "previous_response_id": kept.unkept[0]}
    response = small.client.post("/v1/responses", body)
    assert response.status_code == 404, response.text
    assert kept.unkept[0] in response.json()["error"]["message"]


def test_what_has_ended_cannot_be_cancelled(small: World, kept: Responses) -> None:
    for response_id, before in kept.fetched.items():
        assert small.client.post(f"/v1/responses/{response_id}/cancel", {}).json() == before
