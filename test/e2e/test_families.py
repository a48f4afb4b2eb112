"""Every family of models, saved, killed and restored: the reply of a server that never stopped.

The variants that are not quick are run by `scripts/test --matrix`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from e2e.exactness import (
    ADAPTERS,
    HISTORIES,
    PROMPT,
    REFUSALS,
    RESTORED,
    SEED,
    SHORT,
    UNTAGGED,
    VARIANTS,
    Refusal,
    Variant,
    exactness_world,
)
from e2e.helpers import Reply, assert_close
from e2e.matrix import Recorder, require_gpus
from e2e.reference import assert_as_expected
from e2e.talks import KeyedTalk
from e2e.worlds import TURNS, Stage, World, fresh, next_turn_is_exact
from engram.sglang_plugin.adapters import content_id
from engram.testing.server import ServerError

WORDS = {"extra_buffer": "extra_buffer", "no_buffer": "page_size=1"}
"""What SGLang's refusal of a strategy has in it."""


@pytest.fixture
def world(stage: Stage, variant: Variant, recorder: Recorder) -> World:
    require_gpus(variant.ranks)
    world = stage.world(variant.name, partial(exactness_world, variant=variant))
    recorder.saw(variant.name, Path(world.server.model), world.store)
    return world


def each(variants: Sequence[Variant] = VARIANTS) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "variant", [pytest.param(v, id=v.name, marks=_marks(v)) for v in variants]
    )


def each_case(names: Callable[[Variant], Sequence[str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("variant", "name"),
        [
            pytest.param(v, name, id=f"{v.name}-{name}", marks=_marks(v))
            for v in VARIANTS
            for name in names(v)
        ],
    )


def _marks(variant: Variant) -> list[pytest.MarkDecorator]:
    return [] if variant.quick else [pytest.mark.matrix]


@each([variant for variant in VARIANTS if variant.exact])
def test_replies_are_those_of_transformers(world: World) -> None:
    """Alone and in one batch; prompts longer than the server prefills at once are among them."""
    expected = world.facts["expected"]
    for replies in (world.facts["alone"], world.facts["batch"]):
        for reply, wanted in zip(replies, expected, strict=True):
            assert_as_expected(reply, wanted)


@each_case(lambda variant: RESTORED)
def test_restored_turn_is_exact(world: World, name: str) -> None:
    case = world.cases[name]
    restored = world.client.restore(conversation_id=name)
    assert restored["token_count"] == case.saved["token_count"]
    assert restored["turn_number"] == TURNS
    assert (restored["source_tier"], restored["tier"]) == ("disk", "ram")
    next_turn_is_exact(world, case, name)


@each_case(lambda variant: UNTAGGED)
def test_same_tokens_find_the_state_without_any_id(world: World, name: str) -> None:
    next_turn_is_exact(world, world.cases[name], None)


@each()
def test_what_is_sent_again_computes_one_token(world: World, variant: Variant) -> None:
    """The same prompt, and a turn that is generated again: from one token before its end, or from
    the last page boundary before that."""
    for first, again in world.facts["again"]:
        assert again.cached == variant.boundary(first.prompt_tokens - 1)
        if variant.has_state:
            # Cut there the first time, so that both compute in the same shapes.
            assert again.output == first.output
        elif variant.exact:
            assert_close(again, first, 1e-3)


@each()
def test_a_next_turn_computes_what_is_new(world: World, variant: Variant) -> None:
    (first, _), (second, _) = world.facts["again"]
    computed = first.prompt_tokens + len(first.tokens) - 1
    assert second.cached == variant.boundary(computed)


@each([variant for variant in VARIANTS if variant.interval])
def test_a_branch_starts_near_where_it_parts(world: World, variant: Variant) -> None:
    for common, warm, cold in world.facts["parted"]:
        assert warm.cached == common // variant.interval * variant.interval
        if variant.exact:
            assert_close(warm, cold, 1e-3)


@each()
def test_restored_from_ram_after_vram_forgot_it(world: World) -> None:
    case, again = world.cases["evicted"], world.facts["evicted from ram"]
    assert world.facts["evicted restore"]["source_tier"] == "ram"
    assert again.cached == case.saved["token_count"]
    assert again.output == case.reference.output


@each()
def test_restored_from_disk_after_vram_forgot_it(world: World) -> None:
    world.client.restore(conversation_id="evicted")
    next_turn_is_exact(world, world.cases["evicted"], None)


@each()
def test_turn_that_ends_inside_another_path(world: World, variant: Variant) -> None:
    """The server that never stopped has rows of the longer reply; those of two restores agree."""
    case = world.cases["branch"]
    assert case.saved["token_count"] == variant.boundary(PROMPT + SHORT - 1)
    first = _restored_branch(world)
    if variant.exact:
        assert_close(first, case.reference, 1e-3)
    if variant.has_state:
        # Without one the longer reply's rows serve as far as the tokens agree, so a token longer.
        assert case.reference.cached == first.cached
    world.client.flush()
    assert _restored_branch(world).output == first.output


def _restored_branch(world: World) -> Reply:
    case = world.cases["branch"]
    world.client.restore(conversation_id="branch")
    reply = case.talk.peek(world.client, case.message)
    assert reply.cached == case.saved["token_count"]
    return reply


@each()
def test_random_histories_are_exact(world: World) -> None:
    """Interleaved, broken off, under keys of their own, the server killed in the middle."""
    play = world.facts["histories"]
    play.check()
    assert play.counts["histories"] == HISTORIES
    assert play.counts["killed"] == 1


ADAPTED = [variant for variant in VARIANTS if variant.adapters]


@each(ADAPTED)
def test_a_state_is_used_with_the_adapter_that_made_it_alone(world: World) -> None:
    kept, exchanged = (world.cases[name] for name in ADAPTERS)
    client, talk = world.client, kept.talk
    assert isinstance(talk, KeyedTalk)
    others = ({}, {"lora_path": exchanged.name}, {"lora_path": kept.name, "extra_key": "x"})
    elsewhere = [talk.under(**fields).peek(client, kept.message) for fields in others]
    assert [reply.cached for reply in elsewhere] == [0, 0, 0]
    client.restore(conversation_id=kept.name)
    next_turn_is_exact(world, kept, kept.name)
    # They are three models: a state of another would have shown.
    without, other, same = (reply.output.logprobs for reply in elsewhere)
    assert without != kept.reference.output.logprobs != other != without
    assert same == pytest.approx(kept.reference.output.logprobs, abs=1e-3)


@each(ADAPTED)
def test_an_adapter_with_other_weights_finds_nothing_of_the_one_before(world: World) -> None:
    case = world.cases[ADAPTERS[1]]
    restored = world.client.restore(conversation_id=case.name)
    assert restored["token_count"] == case.saved["token_count"]
    reply = case.talk.peek(world.client, case.message, case.name)
    assert reply.cached == 0
    assert reply.output.logprobs != case.reference.output.logprobs


@each(ADAPTED)
def test_a_generation_from_a_snapshot_needs_its_adapter(world: World) -> None:
    """It is refused: which adapter it was is not recorded."""
    body = {"create_new_request": True, "continuation_ids": [7, 8, 9], "max_new_tokens": 4}
    where = {"conversation_id": ADAPTERS[0], **body}
    refused = world.client.refused("/restore_snapshot", where, 422)
    assert refused["error"] == "unsupported"
    assert "LoRA adapter" in refused["message"]


@each(ADAPTED)
def test_no_extra_key_reads_as_an_adapter(world: World) -> None:
    """SGLang makes one key of an extra key and the adapter's id: with a little knowledge of that a
    request without the adapter would get its states."""
    folder = world.store.parent.parent / ADAPTERS[0]
    extra_key = "mine" + content_id(folder.name, str(folder), "fast")
    body = {"input_ids": [7, 8, 9], "extra_key": extra_key}
    response = world.client.post("/generate", body)
    assert response.status_code == 400
    assert "LoRA adapter" in response.text


@each(ADAPTED)
def test_adapters_are_not_loaded_while_the_server_runs(world: World) -> None:
    body = {"lora_name": "late", "lora_path": "anywhere"}
    refused = world.client.refused("/load_lora_adapter", body, 422)
    assert refused["error"] == "unsupported"


@pytest.mark.matrix
@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_what_sglang_itself_does_not_serve(
    stage: Stage, recorder: Recorder, refusal: Refusal
) -> None:
    """Without Engram's flag, so that nobody else can be to blame."""
    stage.clear()
    model = stage.model(SEED, refusal.family)
    strategy = ("--mamba-scheduler-strategy", refusal.strategy)
    args = [*strategy, "--page-size", str(refusal.page), "--skip-server-warmup"]
    server = stage.server(fresh(stage.folder / refusal.name), args, model=model)
    with pytest.raises(ServerError, match="before it served"):
        server.start()
    said = re.findall(r"^(?:AssertionError|ValueError): (.+)$", server.log_tail(), re.MULTILINE)
    found = [words for words in said if WORDS[refusal.strategy] in words]
    assert found, said
    recorder.refused(refusal.name, model, found[-1])


@each_case(lambda variant: list(variant.altered))
def test_an_altered_value_is_what_the_next_turn_computes_with(world: World, name: str) -> None:
    """The digests are right, so it is served; that `unaltered` is exact then means something."""
    case = world.cases[name]
    world.client.restore(conversation_id=name)
    reply = case.talk.peek(world.client, case.message)
    assert reply.cached == case.saved["token_count"]
    assert reply.output.logprobs != case.reference.output.logprobs
