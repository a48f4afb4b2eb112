"""Every id is plain text, and plain text comes back as it was."""

from __future__ import annotations

import string

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from engram.testing.tiny_tokenizer import BYTES, CHARACTERS, SPECIALS, build_tokenizer

TOKENIZER: PreTrainedTokenizerFast = build_tokenizer(8192)
PLAIN = "\t\n\r" + "".join(chr(code) for code in range(0x20, 0x7F))
IDS = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40)
# What a model may say: characters only.
SPOKEN = st.lists(st.integers(len(SPECIALS), len(SPECIALS) + len(CHARACTERS) - 1), max_size=40)
CONTENTS = st.text(alphabet=PLAIN, max_size=20)
CONVERSATIONS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), CONTENTS), min_size=1, max_size=5
)


def render(turns: list[tuple[str, str]], prompt: bool = False) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert isinstance(text, str)
    return text


def test_every_id_decodes_to_plain_text() -> None:
    assert len(TOKENIZER) == len(SPECIALS) + len(CHARACTERS) + len(BYTES)
    for token in range(len(TOKENIZER)):
        text = TOKENIZER.decode([token])
        assert text
        assert set(text) <= set(PLAIN)


@given(text=st.text(alphabet=PLAIN, max_size=80))
def test_plain_text_comes_back_as_it_was(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(first=IDS, second=IDS)
def test_text_is_the_concatenation_of_its_tokens(first: list[int], second: list[int]) -> None:
    assert TOKENIZER.decode(first + second) == TOKENIZER.decode(first) + TOKENIZER.decode(second)


@given(ids=SPOKEN)
def test_spoken_ids_come_back_from_their_text(ids: list[int]) -> None:
    assert TOKENIZER.encode(TOKENIZER.decode(ids)) == ids


@given(text=st.text(max_size=40))
def test_other_text_is_escaped_byte_by_byte(text: str) -> None:
    wanted = "".join(
        character if character in PLAIN else "".join(f"<0x{b:02X}>" for b in character.encode())
        for character in text
    )
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == wanted


def test_an_escape_typed_by_hand_is_not_a_byte() -> None:
    ids = TOKENIZER.encode("<0xC3>")
    assert len(ids) == 6
    assert TOKENIZER.decode(ids) == "<0xC3>"


def test_special_tokens_are_single_ids() -> None:
    for index, text in enumerate(SPECIALS):
        assert TOKENIZER.encode(text) == [index]
    assert TOKENIZER.eos_token_id == SPECIALS.index("<|endoftext|>")
    assert TOKENIZER.pad_token_id == SPECIALS.index("<|pad|>")


@given(turns=CONVERSATIONS, more=CONVERSATIONS)
def test_a_conversation_only_grows(
    turns: list[tuple[str, str]], more: list[tuple[str, str]]
) -> None:
    assert render(turns + more).startswith(render(turns))


@given(turns=CONVERSATIONS, reply=CONTENTS)
def test_a_reply_follows_its_prompt(turns: list[tuple[str, str]], reply: str) -> None:
    assert render([*turns, ("assistant", reply)]) == render(turns, True) + reply + "<|endoftext|>"


def test_the_rendering_is_what_it_says() -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo"), ("tool", "3")]
    assert render(turns, True) == (
        "<|system|>Be brief.<|user|>Hi<|assistant|>Yo<|endoftext|><|tool|>3<|assistant|>"
    )


def test_an_unknown_role_is_an_error() -> None:
    with pytest.raises(jinja2.TemplateError, match="unknown role: critic"):
        render([("critic", string.ascii_letters)])
