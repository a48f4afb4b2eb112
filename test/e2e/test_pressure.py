"""Small chunks, a pool too small for the load, aborts, flushes and released memory: exact after."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest

from e2e.helpers import TIMEOUT_S, Client, Reply, assert_close, native_reply, random_ids, until
from e2e.pressured_world import (
    CHUNK,
    POOL,
    WARM_GB,
    check_at_rest,
    cold,
    health,
    nothing_is_held,
    rank,
    talked,
)
from e2e.talks import NEW_TOKENS, GenerateTalk
from e2e.worlds import World
from engram.testing.samples import seeded_random
from refusals import refusal

logger = logging.getLogger(__name__)

TOLERANCE = 1e-3
LOGGED_EVERY = 40
"""Decode steps from one line in SGLang's log to the next, its default."""


def goes_on_exactly(world: World, name: str, talk: GenerateTalk) -> None:
    """The newest turn saved, the next one computed on it, warm and restored, is the right one."""
    client = world.client
    saved = client.save(conversation_id=name)
    assert saved["token_count"] == len(talk.history) - 1
    message = talk.message(seeded_random(), 23)
    warm = talk.peek(client, message)
    assert warm.cached == saved["token_count"]
    assert_close(warm, cold(client, [*talk.history, *message], NEW_TOKENS), TOLERANCE)
    client.flush()
    assert client.restore(conversation_id=name)["token_count"] == saved["token_count"]
    restored = talk.peek(client, message)
    assert restored.cached == saved["token_count"]
    assert restored.output == warm.output


# ---- chunks ----


def test_small_chunks_are_exact_and_only_the_end_is_captured(pressured: World) -> None:
    client, numbers = pressured.client, seeded_random()
    before = rank(pressured)["captured"]
    talk = talked(client, numbers, "chunks", 7 * CHUNK + 3)
    until(lambda: nothing_is_held(pressured), "the copy is running")
    assert rank(pressured)["captured"] == before + 1
    goes_on_exactly(pressured, "chunks", talk)
    check_at_rest(pressured)


# ---- several replies to one prompt ----


def several(client: Client, prompt: list[int], n: int, **fields: Any) -> httpx.Response:
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True, "n": n}
    body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True}
    return client.post("/generate", body | {"top_logprobs_num": 5} | fields)


def test_three_replies_to_one_prompt_are_exact(pressured: World) -> None:
    client, numbers = pressured.client, seeded_random()
    talk = talked(client, numbers, "three", 50)
    prompt = [*talk.history, *random_ids(numbers, 40)]
    reference = cold(client, prompt, NEW_TOKENS)
    first = several(client, prompt, 3)
    client.flush()
    restored = several(client, prompt, 3)
    for response in (first, restored):
        replies = [native_reply(body) for body in response.json()]
        assert len({reply.rid for reply in replies}) == len(replies) == 3
        for reply in replies:
            assert_close(reply, reference, TOLERANCE)
            assert reply.cached > 0
    # Whichever of them becomes a turn of a conversation, it is that one.
    rid = native_reply(restored.json()[1]).rid
    saved = client.save(rid=rid, conversation_id="three-adopted")
    assert client.info(conversation_id="three-adopted")["fill_ids"] == [*prompt, *reference.tokens]
    assert saved["token_count"] == len(prompt) + NEW_TOKENS - 1
    check_at_rest(pressured)


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/completions"])
def test_three_replies_cannot_be_one_turn(pressured: World, path: str) -> None:
    client = pressured.client
    if path == "/generate":
        response = several(client, [10, 11, 12], 3, conversation_id="three-tagged")
    else:
        body = {"model": "default", "n": 3, "max_tokens": 2, "conversation_id": "three-tagged"}
        prompt = {"prompt": "a"} if path.endswith("/v1/completions") else {}
        chat = {"messages": [{"role": "user", "content": "a"}]}
        response = client.post(path, body | (prompt or chat))
    assert response.status_code == 422, response.text
    assert refusal(response)["details"]["field"] == "n"


# ---- aborts ----


@dataclass(frozen=True)
class Ended:
    """How a request ended."""

    tokens: tuple[int, ...]
    finish: str


class Underway:
    """A request that runs in a thread of its own, with a rid that the test knows."""

    def __init__(self, world: World, rid: str, prompt: list[int], new: int, name: str) -> None:
        self.world, self.rid = world, rid
        self.log = world.server.log_path
        self.begin = self.log.stat().st_size
        self._pool = ThreadPoolExecutor(1)
        body = {
            "input_ids": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": new, "ignore_eos": True},
            "rid": rid,
            "conversation_id": name,
        }
        client = Client(world.server.url)
        self._reply: Future[httpx.Response] = self._pool.submit(client.post, "/generate", body)

    def steps(self, kind: str) -> int:
        """Batches of this kind since it was sent, as SGLang logs them."""
        with self.log.open("rb") as log:
            log.seek(self.begin)
            return log.read().count(kind.encode())

    def abort(self) -> None:
        self.world.client.post("/abort_request", {"rid": self.rid})

    def reply(self) -> Ended:
        with self._pool:
            response = self._reply.result(TIMEOUT_S)
        assert response.status_code == 200, response.text
        body = response.json()
        return Ended(tuple(body["output_ids"]), body["meta_info"]["finish_reason"]["type"])


def test_abort_in_the_middle_of_a_prefill(pressured: World) -> None:
    client, numbers = pressured.client, seeded_random()
    talk = talked(client, numbers, "prefill-abort")
    chunks = 800 // CHUNK
    for attempt in range(5):
        captured = rank(pressured)["captured"]
        prompt = [*talk.history, *random_ids(numbers, 800)]
        running = Underway(pressured, f"prefill-abort-{attempt}", prompt, 4, "prefill-abort")
        until(lambda u=running: u.steps("Prefill batch") >= 3, "the prefill never began")
        running.abort()
        reply = running.reply()
        if reply.finish == "abort" and running.steps("Prefill batch") < chunks:
            break
    else:
        pytest.fail("the prefill was always over before the abort came")
    assert len(reply.tokens) == 0
    check_at_rest(pressured)
    assert rank(pressured)["captured"] == captured, "a prompt cut short is nobody's turn"
    refused = client.refused("/save_snapshot", {"rid": running.rid}, 404)
    assert refused["error"] == "not_found"
    talk.say(client, talk.message(numbers, 20), "prefill-abort")
    assert client.save(conversation_id="prefill-abort")["turn_number"] == 3
    goes_on_exactly(pressured, "prefill-abort", talk)


def test_abort_in_the_middle_of_a_decode(pressured: World) -> None:
    client, numbers = pressured.client, seeded_random()
    talk = talked(client, numbers, "decode-abort")
    prompt = [*talk.history, *random_ids(numbers, 20)]
    running = Underway(pressured, "decode-abort-1", prompt, 900, "decode-abort")
    until(lambda: running.steps("Decode batch") >= 1, "the decode never began")
    running.abort()
    reply = running.reply()
    assert reply.finish == "abort"
    assert 0 < len(reply.tokens) < 900
    check_at_rest(pressured)
    client.refused("/save_snapshot", {"rid": "decode-abort-1"}, 404)
    # What it had computed is in the tree, and is right.
    longer = [*prompt, *reply.tokens, *random_ids(numbers, 5)]
    again = client.generate(longer, NEW_TOKENS)
    assert again.cached >= len(prompt) + len(reply.tokens) - 1
    assert_close(again, cold(client, longer, NEW_TOKENS), TOLERANCE)
    talk.say(client, talk.message(numbers, 20), "decode-abort")
    assert client.save(conversation_id="decode-abort")["turn_number"] == 3
    goes_on_exactly(pressured, "decode-abort", talk)


def test_a_client_that_hangs_up_in_the_middle_of_a_decode(pressured: World) -> None:
    client, numbers = pressured.client, seeded_random()
    talk = talked(client, numbers, "gone")
    body = {
        "input_ids": [*talk.history, *random_ids(numbers, 20)],
        "sampling_params": {"temperature": 0, "max_new_tokens": 1000, "ignore_eos": True},
        "stream": True,
        "rid": "gone-1",
        "conversation_id": "gone",
    }
    begin = pressured.server.log_path.stat().st_size
    with client.http.stream("POST", "/generate", json=body) as response:
        next(response.iter_lines())
    client.flush()  # waits until no request is running
    with pressured.server.log_path.open("rb") as log:
        log.seek(begin)
        steps = log.read().count(b"Decode batch")
    assert steps < 1000 // LOGGED_EVERY, "it ran to its end"
    check_at_rest(pressured)
    client.refused("/save_snapshot", {"rid": "gone-1"}, 404)
    talk.say(client, talk.message(numbers, 20), "gone")
    assert client.save(conversation_id="gone")["turn_number"] == 3
    goes_on_exactly(pressured, "gone", talk)


def test_a_waiting_request_that_is_aborted_leaves_no_lease(pressured: World) -> None:
    """Its prefix was promised by a lookup; without the way round that ends after a minute only."""
    client, numbers = pressured.client, seeded_random()
    talk = talked(client, numbers, "waiting", 100)
    client.save(conversation_id="waiting")
    client.flush()
    # All of the pool is taken, so that what comes next waits.
    large = Underway(pressured, "large", random_ids(numbers, POOL // 2), POOL // 2 - 20, "large")
    until(lambda: large.steps("Decode batch") >= 1, "the large one never began")
    prompt = [*talk.history, *random_ids(numbers, POOL // 2)]
    waiting = Underway(pressured, "waits", prompt, 4, "waiting")
    until(lambda: rank(pressured)["leases"] > 0, "nothing was promised")
    waiting.abort()
    assert waiting.reply().finish == "abort"
    begun = time.monotonic()
    until(lambda: rank(pressured)["leases"] == 0, "the lease has outlived its request")
    assert time.monotonic() - begun < 30, "it ended by itself"
    large.abort()
    assert large.reply().finish == "abort"
    check_at_rest(pressured)
    goes_on_exactly(pressured, "waiting", talk)


# ---- retraction ----


NOT_ENDING = {"ignore_eos": False, "logit_bias": {"0": -1000.0}}
"""Without the end of text, but SGLang does not know: it admits more than will fit."""


def test_turns_that_were_retracted_are_exact(pressured: World) -> None:
    """Six replies together need more than the pool has: SGLang takes some back and begins again."""
    client, numbers = pressured.client, seeded_random()
    names = [f"retracted-{n}" for n in range(6)]
    prompts = {name: random_ids(numbers, 60) for name in names}
    retractions = {}

    def reply(name: str) -> Reply:
        body = {
            "input_ids": prompts[name],
            "sampling_params": {"temperature": 0, "max_new_tokens": 260, **NOT_ENDING},
            "return_logprob": True,
            "top_logprobs_num": 5,
            "conversation_id": name,
        }
        answer = Client(pressured.server.url).post("/generate", body).json()
        retractions[name] = answer["meta_info"]["num_retractions"]
        return native_reply(answer)

    with ThreadPoolExecutor(len(names)) as clients:
        replies = dict(zip(names, clients.map(reply, names), strict=True))
    retracted = [name for name in names if retractions[name] > 0]
    assert retracted, "the pool was large enough for all of them"
    check_at_rest(pressured)
    for name in names:
        assert_close(replies[name], cold(client, prompts[name], 260, NOT_ENDING), TOLERANCE)
    for name in [*retracted, names[0]]:
        talk = GenerateTalk()
        talk.history = [*prompts[name], *replies[name].tokens]
        goes_on_exactly(pressured, name, talk)
    check_at_rest(pressured)


# ---- an emptied tree, released memory ----


def test_the_cache_may_be_flushed_at_any_time(pressured: World) -> None:
    """While copies and saves are under way, over and over."""
    client, numbers = pressured.client, seeded_random()
    talks = {f"flushed-{n}": GenerateTalk() for n in range(3)}
    messages = {name: [random_ids(numbers, 25) for _ in range(4)] for name in talks}
    over = threading.Event()
    flushed = 0

    def flush() -> None:
        nonlocal flushed
        with Client(pressured.server.url).http as http:
            while not over.is_set():
                flushed += http.post("/flush_cache").status_code == 200

    def talk(name: str) -> None:
        mine = Client(pressured.server.url)
        for message in messages[name]:
            talks[name].say(mine, message, name)
            mine.save(conversation_id=name, durability="async")

    flushing = threading.Thread(target=flush)
    flushing.start()
    try:
        with ThreadPoolExecutor(len(talks)) as clients:
            list(clients.map(talk, talks))
    finally:
        over.set()
        flushing.join()
    assert flushed > 0
    for name, mine in talks.items():
        assert client.save(conversation_id=name)["turn_number"] == 4
        goes_on_exactly(pressured, name, mine)
    check_at_rest(pressured)


def test_memory_may_be_released_and_resumed(pressured: World) -> None:
    client, numbers = pressured.client, seeded_random()
    talk = talked(client, numbers, "released")
    saved = client.save(conversation_id="released")
    message = talk.message(numbers, 23)
    reference = talk.peek(client, message)
    changes = rank(pressured)["weights_changes"]
    for tags in ({}, {"tags": ["kv_cache"]}):
        client.generate(random_ids(numbers, 40), 2, "released-other")  # its copy may be running
        assert client.post("/release_memory_occupation", tags).status_code == 200
        assert client.post("/resume_memory_occupation", tags).status_code == 200
        reply = talk.peek(client, message)
        assert reply.cached == saved["token_count"]
        assert reply.output == reference.output
    assert rank(pressured)["weights_changes"] == changes
    check_at_rest(pressured)
    goes_on_exactly(pressured, "released", talk)


# ---- leaks ----

REQUESTS = 500
RSS_SLACK = 40 << 20
"""What allocators and Python may keep after 500 requests beyond what they had after 100."""


def mixed_requests(world: World, count: int, name: str) -> None:
    """Tagged and untagged turns, saves, restores, aborts and deletions, from four clients."""
    numbers = seeded_random()
    seeds = [numbers.randrange(2**32) for _ in range(4)]

    def client_of(seed: int) -> None:
        rng, client = type(numbers)(seed), Client(world.server.url)
        own = f"{name}-{seed}"
        talk, turn = GenerateTalk(), 0
        for step in range(count // 4):
            kind = step % 10
            if kind in (0, 3, 6):
                if kind == 0 and len(talk.history) > 200:
                    talk, turn, own = GenerateTalk(), 0, f"{name}-{seed}-{step}"
                talk.say(client, talk.message(rng, 12), own)
                turn += 1
            elif kind == 1:
                client.save(conversation_id=own)
            elif kind == 4:
                client.restore(conversation_id=own)
            elif kind == 7:
                client.save(conversation_id=own)
                client.delete(conversation_id=own, turn_number=turn)
            elif kind == 5:
                rid = f"{own}-{step}"
                aborting = threading.Timer(0.05, client.post, ("/abort_request", {"rid": rid}))
                aborting.start()
                aborted(client, random_ids(rng, 150), rid)
                aborting.join()
            else:
                client.generate(random_ids(rng, 40), 3)
        client.http.close()

    with ThreadPoolExecutor(4) as clients:
        list(clients.map(client_of, seeds))


def aborted(client: Client, prompt: list[int], rid: str) -> None:
    """A request that may be aborted, or may be over by then."""
    params = {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": params, "rid": rid}
    assert client.post("/generate", body).status_code == 200


def open_files(world: World) -> int:
    return sum(process.num_fds() for process in family(world))


def resident_bytes(world: World) -> int:
    return sum(process.memory_info().rss for process in family(world))


def family(world: World) -> list[psutil.Process]:
    assert world.server.process is not None
    leader = psutil.Process(world.server.process.pid)
    return [leader, *leader.children(recursive=True)]


def test_five_hundred_requests_leave_nothing_behind(pressured: World) -> None:
    """Slots, files, memory and what is held are what they were before.

    The first hundred fill the RAM tier, the tokenizer's and the allocator's pools.
    """
    client = pressured.client
    mixed_requests(pressured, 120, "warming")
    client.flush()
    check_at_rest(pressured)
    files, memory, before = open_files(pressured), resident_bytes(pressured), health(pressured)
    mixed_requests(pressured, REQUESTS, "mixed")
    client.flush()
    check_at_rest(pressured)
    after = health(pressured)
    assert after["service"]["save_failures"] == before["service"]["save_failures"]
    assert after["service"]["restore_failures"] == before["service"]["restore_failures"]
    assert after["service"]["lost_turns"] == 0
    assert after["ranks"][0]["ram_bytes"] <= WARM_GB * 1e9
    until(lambda: open_files(pressured) <= files + 4, "file descriptors were left open")
    grown = resident_bytes(pressured) - memory
    logger.info("open files %d -> %d", files, open_files(pressured))
    logger.info("resident bytes %d, and %d more", memory, grown)
    # The RAM tier may have been filled since, the rest must not grow with the requests.
    assert grown < WARM_GB * 1e9 + RSS_SLACK
    # All of the pool is free: a request may have nearly every slot of it.
    reply = client.generate(random_ids(seeded_random(), POOL - 200), 150)
    assert len(reply.tokens) == 150
    goes_on_exactly(pressured, "after", talked(client, seeded_random(), "after"))
