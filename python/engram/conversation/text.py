"""Texts and the tokens they were: which recorded tokens a rendered history stands for.

Text that was tokenised, decoded and tokenised again need not be the same tokens: a model may write
"th" + "e" where the tokenizer writes "the", and bytes that are no UTF-8 come back as U+FFFD.  What
is recorded is therefore taken as it is, as far as the texts are equal, and only what follows is
tokenised.  Tokens are cut where the tokenizer itself cuts whatever the text: at an added token.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from engram.core.tokens import TokenArray


class TextCodec(Protocol):
    """A tokenizer: text to ids and back, with nothing added, skipped or cleaned up."""

    added: frozenset[int]
    """Ids of added tokens: the text before and after one is tokenised by itself."""
    added_texts: tuple[str, ...]
    """What they read as."""
    ends: frozenset[int]
    """Those that end a reply."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def reuse(recorded: TokenArray, rendered: str, codec: TextCodec) -> list[int] | None:
    """The tokens of `rendered`, of which the beginning is recorded; None if nothing of it is.

    Args:
        recorded: all tokens of a conversation so far, u32.
        rendered: what the chat template makes of a whole history.
    """
    ids = recorded.tolist()
    count, text = _common(ids, rendered, codec)
    if count < len(ids):
        # Perhaps only because the tokenizer changes text: then both sides as it reads them.
        whole = codec.encode(rendered)
        read = codec.decode(whole)
        more, shown = _common(ids, read, codec) if read != rendered else (0, "")
        place = _place(whole, shown, codec) if more > count else None
        if place is not None:
            return [*ids[:more], *whole[place:]]
    rest = encode_after(ids[:count], rendered[len(text) :], codec) if count else None
    return None if rest is None else [*ids[:count], *rest]


def extend(recorded: TokenArray, rendered: str, codec: TextCodec) -> list[int] | None:
    """As `reuse`, but only where all that is recorded is the beginning of `rendered`, apart from
    the token that ends its reply."""
    ids = recorded.tolist()
    whole = ids[:-1] if ids and ids[-1] in codec.ends else ids
    found = reuse(recorded, rendered, codec)
    if found is None or found[: len(whole)] != whole or len(found) <= len(whole):
        return None
    return found


def encode_after(before: Sequence[int], text: str, codec: TextCodec) -> list[int] | None:
    """The tokens of `text` where it follows `before`, as if both had been tokenised together.

    None where that cannot be told: no added token parts them.
    """
    if not text:
        return []
    if before and before[-1] in codec.added:
        # Not by itself: some tokenizers put a blank before what is first.
        anchor = int(before[-1])
        ids = codec.encode(codec.decode([anchor]) + text)
        return ids[1:] if ids[:1] == [anchor] else None
    rest = text.lstrip()
    if not rest.startswith(codec.added_texts):
        return None
    blanks = text[: len(text) - len(rest)]
    ids = codec.encode(blanks) if blanks else []
    return [*ids, *codec.encode(rest)] if codec.decode(ids) == blanks else None


def _common(ids: list[int], rendered: str, codec: TextCodec) -> tuple[int, str]:
    """The most of `ids` that `rendered` begins with, cut at an added token, and their text."""
    cuts = [0]
    for index, one in enumerate(ids):
        if one in codec.added:
            cuts += [index, index + 1]
    cuts = sorted({*cuts, len(ids)})

    def differs(cut: int) -> bool:
        return not rendered.startswith(codec.decode(ids[:cut]))

    # The text of fewer tokens is the beginning of the text of more.
    last = bisect.bisect_left(cuts, True, key=differs) - 1
    for cut in reversed(cuts[: last + 1]):
        text = codec.decode(ids[:cut])
        rest = rendered[len(text) :]
        if cut and rendered.startswith(text):
            if ids[cut - 1] in codec.added or not rest:
                return cut, text
            if rest.lstrip().startswith(codec.added_texts):
                return cut, text
    return 0, ""


def _place(ids: list[int], text: str, codec: TextCodec) -> int | None:
    """How many of `ids` read as exactly `text`; None if none do."""
    place = bisect.bisect_left(
        range(len(ids) + 1), len(text), key=lambda count: len(codec.decode(ids[:count]))
    )
    return place if place <= len(ids) and codec.decode(ids[:place]) == text else None


SPEAKERS: Final = frozenset({"user", "assistant", "tool", "function"})
"""Roles whose messages stand where they are said; all others give instructions."""

Render = Callable[[list[dict[str, object]]], str]
"""What the chat template makes of messages, and of the tools of this request."""


def new_part(render: Render, messages: list[dict[str, object]], mark: str) -> str | None:
    """What follows a reply when `messages` follow it: the end of its turn, the messages, and where
    the next reply begins.  None if that depends on what was before.

    `mark` is a text that occurs nowhere else; it stands for the reply.
    """
    pair: list[dict[str, object]] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": mark},
    ]
    earlier: list[dict[str, object]] = [
        {"role": "user", "content": "b c"},
        {"role": "assistant", "content": "d"},
    ]
    parts = []
    for history in (pair, [*earlier, *pair]):
        found = render([*history, *messages]).split(mark)
        if len(found) != 2:
            return None
        parts.append(found[1])
    return parts[0] if parts[0] == parts[1] else None


def instructions_missing(render: Render, messages: list[dict[str, object]], mark: str) -> bool:
    """Whether system messages among new ones are not in their new part: some templates state them
    at the beginning wherever they stand, or leave them out.

    `mark` is a text that occurs nowhere else.
    """
    texts: list[str] = []
    marked = []
    for message in messages:
        if message.get("role") not in SPEAKERS:
            texts.append(f"{mark}.{len(texts)}.")
            text: object = texts[-1]
            if isinstance(message.get("content"), list):
                text = [{"type": "text", "text": text}]
            message = {**message, "content": text}
        marked.append(message)
    if not texts:
        return False
    part = new_part(render, marked, f"{mark}.reply.")
    return part is None or any(text not in part for text in texts)


def join(recorded: TokenArray, part: str, codec: TextCodec) -> list[int] | None:
    """All tokens of a prompt that goes on from `recorded` with `part`, which begins with the end of
    a turn; None where they cannot be told.

    A reply that ended by itself has the token that ends it: it is not there twice.  Where the
    template ends a turn with another one, the model's own gives way: it is pending, nothing has
    been computed from it.
    """
    ids = recorded.tolist()
    if ids and ids[-1] in codec.ends:
        end = codec.decode(ids[-1:])
        if part.lstrip().startswith(end):
            part = part.lstrip()[len(end) :]
        else:
            ids = ids[:-1]
    rest = encode_after(ids, part, codec)
    if rest is None:
        rest = codec.encode(part)
        if codec.decode([*ids, *rest]) != codec.decode(ids) + part:
            return None
    return [*ids, *rest]


def tools_missing(heads: tuple[str, str], recorded_text: str) -> bool:
    """Whether what tools add to the head of a prompt is not in a recorded text.

    Args:
        heads: the head of some prompt without the tools, and with them.
    """
    plain, full = heads
    if plain == full:
        return False
    start = 0
    while start < min(len(plain), len(full)) and plain[start] == full[start]:
        start += 1
    end = 0
    limit = min(len(plain), len(full)) - start
    while end < limit and plain[-1 - end] == full[-1 - end]:
        end += 1
    added = full[start : len(full) - end]
    return added.strip() not in recorded_text
