"""Recorded tokens in the place of text that would be tokenised again, with real tokenizers."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from random import Random
from typing import Any

import jinja2
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engram.conversation.text import encode_after, join, new_part, reuse, tools_missing
from engram.core.tokens import to_tokens
from engram.testing.samples import seeded_random
from engram.testing.tiny_tokenizer import build_tokenizer

SPECIALS = ("<|end|>", "<|stop|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>")
END, STOP, USER, ASSISTANT = range(4)

PLAIN = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% if m.role == 'assistant' %}{{ '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
STRIPPING = PLAIN.replace(
    "m.content }}", "(m.content if loop.last else m.content.split('</think>')[-1]) }}"
)
COUNTING = PLAIN.replace("{% for m in messages %}", "{% for m in messages %}{{ loop.index }}")


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges: texts have one canonical form and many others."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("an", "d"), ("Ġ", "a"), ("l", "l")]
    words = [*SPECIALS, *alphabet, *(one + other for one, other in merges)]
    backend = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


class Codec:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added = frozenset(tokenizer.added_tokens_decoder)
        self.added_texts = tuple(map(str, tokenizer.added_tokens_decoder.values()))
        self.ends = frozenset({END, STOP})
        self.encoded: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.encoded.append(text)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture
def codec(tokenizer: PreTrainedTokenizerFast) -> Codec:
    return Codec(tokenizer)


@pytest.fixture
def rng() -> Random:
    return seeded_random()


def render(messages: list[dict[str, Any]], template: str = PLAIN, prompt: bool = True) -> str:
    return jinja2.Template(template).render(messages=messages, add_generation_prompt=prompt)


def history(*texts: str) -> list[dict[str, Any]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def split_up(codec: Codec, text: str, rng: Random) -> list[int]:
    """Tokens that read as `text` but that the tokenizer would not write: single bytes."""
    ids = []
    for piece in text:
        ids += codec.encode(piece)
    assert codec.decode(ids) == text
    return ids


def test_a_reply_that_tokenises_differently_keeps_its_tokens(codec: Codec, rng: Random) -> None:
    reply = "the land and all the rest"
    prompt = codec.encode(render(history("hello")))
    recorded = [*prompt, *split_up(codec, reply, rng), END]
    rendered = render(history("hello", reply, "the next"))
    assert codec.encode(rendered)[: len(recorded)] != recorded  # as it is without us
    codec.encoded.clear()
    found = reuse(to_tokens(recorded), rendered, codec)
    assert found == [*recorded, *codec.encode("\n<|user|>the next<|assistant|>")]
    assert codec.decode(found) == rendered
    assert not any("hello" in text for text in codec.encoded), "the history was tokenised again"


def test_invalid_utf8_in_a_reply_keeps_its_tokens(codec: Codec) -> None:
    prompt = codec.encode(render(history("hello")))
    euro = codec.encode("€")
    assert len(euro) == 3
    for broken in (euro[:2], euro[1:], [*euro[:1], *euro], [*euro, euro[0]]):
        recorded = [*prompt, *codec.encode("a"), *broken, END]
        text = codec.decode(recorded[len(prompt) : -1])
        assert "\ufffd" in text
        rendered = render(history("hello", text, "next"))
        found = reuse(to_tokens(recorded), rendered, codec)
        assert found is not None
        assert found[: len(recorded)] == recorded
        # Ended by its length, within a character.
        found = reuse(to_tokens(recorded[:-1]), rendered, codec)
        assert found == [*recorded, *codec.encode("\n<|user|>next<|assistant|>")]


def test_a_template_that_strips_reasoning_gets_what_it_renders(codec: Codec, rng: Random) -> None:
    first = [*codec.encode(render(history("a"))), *split_up(codec, "and the", rng), END]
    second = "<think>the land</think>all"
    prompt = codec.encode("\n<|user|>b<|assistant|>")
    recorded = [*first, *prompt, *split_up(codec, second, rng), END]
    rendered = render(history("a", "and the", "b", second, "c"), STRIPPING)
    assert "think" not in rendered
    found = reuse(to_tokens(recorded), rendered, codec)
    assert found is not None
    # As far as it is the same text, and then as stock has it.
    kept = [*first, *prompt]
    assert found == [*kept, *codec.encode("all<|end|>\n<|user|>c<|assistant|>")]


@pytest.mark.parametrize(
    ("texts", "kept"),
    [
        (("a", "and the", "b", "the land", "c"), "all"),
        (("a", "and the", "b"), "one turn"),
        (("a", "and the", "B", "the land", "c"), "one turn"),
        (("a", "and the end", "b", "the land", "c"), "a prompt"),
        (("a", "and thE", "b", "the land", "c"), "a prompt"),
        (("x", "and the", "b", "the land", "c"), "a token"),
    ],
)
def test_an_edited_history_is_recorded_up_to_the_edit(
    codec: Codec, rng: Random, texts: tuple[str, ...], kept: str
) -> None:
    prompt = codec.encode(render(history("a")))
    first = [*prompt, *split_up(codec, "and the", rng), END]
    header = codec.encode("\n<|user|>b<|assistant|>")
    recorded = [*first, *header, *split_up(codec, "the land", rng), END]
    rendered = render(history(*texts))
    found = reuse(to_tokens(recorded), rendered, codec)
    assert found is not None
    assert codec.decode(found) == rendered
    count = {"all": len(recorded), "one turn": len(first), "a prompt": len(prompt), "a token": 1}
    same = count[kept]
    assert found[:same] == recorded[:same]
    rest = rendered[len(codec.decode(recorded[:same])) :]
    assert found[same:] == codec.encode(rest)


def test_nothing_in_common_is_stock(codec: Codec) -> None:
    recorded = to_tokens(codec.encode("plain text"))
    assert reuse(recorded, "another", codec) is None
    # A reply that the client has written further would be other tokens.
    assert reuse(recorded, "plain text and more", codec) is None


def test_another_end_than_the_templates_does_not_cost_the_reply(codec: Codec, rng: Random) -> None:
    reply = split_up(codec, "the land", rng)
    recorded = [*codec.encode(render(history("a"))), *reply, STOP]
    found = reuse(to_tokens(recorded), render(history("a", "the land", "b")), codec)
    assert found == [*recorded[:-1], END, *codec.encode("\n<|user|>b<|assistant|>")]


def test_a_tokenizer_that_changes_text(rng: Random) -> None:
    tiny = build_tokenizer(512)
    codec = Codec(tiny)
    end, user, assistant = (
        tiny.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|user|>", "<|assistant|>")
    )
    recorded = [user, *codec.encode("é?"), assistant, *codec.encode("yes é"), end]
    read = codec.decode(codec.encode("yes é"))
    assert read == "yes <0xC3><0xA9>"
    new = "<|user|>ñ<|assistant|>"
    for said in ("yes é", read):
        # The client has the reply as it was read to it, or is told what the tokens stand for.
        found = reuse(
            to_tokens(recorded), f"<|user|>é?<|assistant|>{said}<|endoftext|>{new}", codec
        )
        assert found is not None
        assert found[: len(recorded) - 1 - len(codec.encode("é"))] == recorded[:-3]
        assert found[-len(codec.encode(new)) :] == codec.encode(new)
    rendered = f"<|user|>é?<|assistant|>yes é<|endoftext|>{new}"
    assert reuse(to_tokens(recorded), rendered, codec) == [*recorded, *codec.encode(new)]
    assert join(to_tokens(recorded), f"<|endoftext|>{new}", codec) == [
        *recorded,
        *codec.encode(new),
    ]


def test_a_tokenizer_that_composes_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    composing = byte_level()
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    codec = Codec(composing)
    apart = unicodedata.normalize("NFD", "é")
    prompt = codec.encode(render(history(apart)))
    assert codec.decode(prompt) != render(history(apart))
    recorded = [*prompt, *split_up(codec, "the land", seeded_random()), END]
    rendered = render(history(apart, "the land", apart))
    found = reuse(to_tokens(recorded), rendered, codec)
    new = codec.encode(f"\n<|user|>{apart}<|assistant|>")
    assert found == [*recorded, *new]
    assert join(to_tokens(recorded), f"<|end|>\n<|user|>{apart}<|assistant|>", codec) == found


def test_random_histories_read_as_they_are_rendered(codec: Codec, rng: Random) -> None:
    letters = "thelandé€ \n<|x"
    for _ in range(60):
        texts = ["".join(rng.choices(letters, k=rng.randint(0, 12))) for _ in range(7)]
        if any(special in text for text in texts for special in SPECIALS):
            continue
        recorded = codec.encode(render(history(texts[0])))
        for reply, user in zip(texts[1::2], texts[2::2], strict=True):
            end = rng.choice([[END], [STOP], []])
            recorded += [*split_up(codec, reply, rng), *end]
            kept = list(recorded)
            joined = join(to_tokens(recorded), f"<|end|>\n<|user|>{user}<|assistant|>", codec)
            assert joined is not None
            recorded = joined
        rendered = render(history(*texts))
        assert codec.decode(recorded) == rendered
        turns = [texts[: n + 1] for n in range(0, len(texts), 2)]
        for said in turns:
            found = reuse(to_tokens(kept), render(history(*said)), codec)
            assert found is not None
            assert codec.decode(found) == render(history(*said))


def test_the_new_part_begins_with_the_end_of_the_turn() -> None:
    messages = [{"role": "user", "content": "new"}]
    part = new_part(lambda found: render(found), messages, "MARK")
    assert part == "<|end|>\n<|user|>new<|assistant|>"
    assert new_part(lambda found: render(found, STRIPPING), messages, "MARK") == part
    assert new_part(lambda found: render(found, prompt=False), messages, "MARK") == part[:-13]
    tool = [{"role": "tool", "content": "7"}, *messages]
    with_tool = new_part(lambda found: render(found), tool, "MARK")
    assert with_tool == "<|end|>\n<|tool|>7<|user|>new<|assistant|>"


def test_a_template_that_looks_back_has_no_new_part() -> None:
    messages = [{"role": "user", "content": "new"}]
    assert new_part(lambda found: render(found, COUNTING), messages, "MARK") is None
    assert new_part(lambda _: "no reply in it", messages, "MARK") is None
    assert new_part(lambda found: 2 * render(found), messages, "MARK") is None


def test_joining_ends_a_turn_once(codec: Codec) -> None:
    part = "<|end|>\n<|user|>b<|assistant|>"
    body = codec.encode("<|user|>a<|assistant|>the land")
    wanted = [*body, *codec.encode(part)]
    for ending in ([END], [STOP], []):
        assert join(to_tokens([*body, *ending]), part, codec) == wanted
    # Blanks that a template puts before the end of a turn.
    assert join(to_tokens([*body, END]), " " + part, codec) == wanted
    assert join(to_tokens([*body, ASSISTANT]), part, codec) == [
        *body,
        ASSISTANT,
        *codec.encode(part),
    ]


def test_a_part_without_added_tokens_is_joined_where_it_reads_back(codec: Codec) -> None:
    body = codec.encode("the land")
    assert join(to_tokens(body), "\nUSER: b", codec) == [*body, *codec.encode("\nUSER: b")]
    assert encode_after(body, "\nUSER: b", codec) is None


def test_a_blank_that_a_tokenizer_puts_first_stays_out() -> None:
    backend = Tokenizer(
        models.BPE(
            {text: n for n, text in enumerate([*SPECIALS, "▁", "a", "b", "▁a"])}, [("▁", "a")]
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    codec = Codec(PreTrainedTokenizerFast(tokenizer_object=backend))
    [blank, a, b] = (backend.token_to_id(text) for text in ("▁", "a", "b"))
    assert codec.encode("ab")[0] == backend.token_to_id("▁a")
    assert encode_after([USER], "ab", codec) == [a, b]
    assert blank not in (encode_after([USER], "ab<|end|>b", codec) or [])


def test_tools_are_looked_for_where_they_were_stated() -> None:
    def heads(tools: str) -> tuple[str, str]:
        return "<|system|>S<|user|>", f"<|system|>S# Tools\n{tools}\n<|user|>"

    recorded = "<|system|>You are it.# Tools\n[f, g]\n<|user|>hello"
    assert not tools_missing(heads("[f, g]"), recorded)
    assert tools_missing(heads("[f]"), recorded)
    assert tools_missing(heads("[f, g]"), "<|system|>You are it.<|user|>hello")
    assert not tools_missing(("same", "same"), "anything")
