"""SGLang's chat template and tokenizer: the tokens of messages, whole or behind recorded ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from uuid import uuid4

from engram.conversation.text import instructions_missing, join, new_part, tools_missing
from engram.core.tokens import TokenArray
from engram.errors import UnsupportedError

SEND_ALL: Final = "send the whole history to /v1/chat/completions instead"


class Codec:
    """SGLang's tokenizer as `engram.conversation.text.TextCodec`."""

    def __init__(self, manager: Any, encode_kwargs: dict[str, Any]) -> None:
        self._tokenizer = manager.tokenizer
        self._encode_kwargs = encode_kwargs
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        self.added = frozenset(added)
        self.added_texts = tuple(str(token) for token in added.values())
        self.ends = end_tokens(manager)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, as upstream has them of a rendered prompt."""
        ids = self._tokenizer.encode(text, **self._encode_kwargs)
        return [int(one) for one in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special ones included."""
        text: str = self._tokenizer.decode(
            list(ids),
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        return text


def end_tokens(manager: Any) -> frozenset[int]:
    """The tokens at which a reply ends by itself."""
    tokenizer = manager.tokenizer
    found = {tokenizer.eos_token_id, *(manager.model_config.hf_eos_token_id or ())}
    found |= set(getattr(tokenizer, "additional_stop_token_ids", None) or ())
    return frozenset(int(one) for one in found if one is not None)


class ChatTemplate:
    """How SGLang's object that serves chats makes prompts of messages."""

    def __init__(self, chat: Any) -> None:
        self._chat = chat

    def codec(self, encode_kwargs: dict[str, Any]) -> Codec:
        """The tokenizer as upstream uses it for these prompts."""
        return Codec(self._chat.tokenizer_manager, encode_kwargs)

    def plain(self) -> bool:
        """Whether prompts are texts that a chat template makes, and nothing else."""
        chat, templates = self._chat, self._chat.template_manager
        return (
            chat.chat_encoding_spec is None
            and templates.chat_template_name is None
            and templates.python_chat_template is None
            and not chat._prompt_text_round_trip_is_lossy
            and not chat.tokenizer_manager.model_config.is_multimodal
        )

    def render(self, messages: Any, kw: dict[str, Any]) -> str:
        """As upstream renders them."""
        text: str = self._chat.tokenizer_manager.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=kw.get("add_generation_prompt", True),
            tools=kw["tools"],
            return_dict=False,
            **kw["template_kwargs"],
        )
        return text

    def append(self, recorded: TokenArray, messages: Any, kw: dict[str, Any]) -> list[int]:
        """All tokens of a prompt whose new messages follow what is recorded."""
        codec = Codec(self._chat.tokenizer_manager, kw["encode_kwargs"])
        mark = uuid4().hex
        part = new_part(lambda all_messages: self.render(all_messages, kw), messages, mark)
        if part is None:
            raise UnsupportedError(
                "this model's chat template renders a message differently with what is before it",
                hint=SEND_ALL,
                details={"field": "messages"},
            )
        if instructions_missing(lambda found: self.render(found, kw), messages, uuid4().hex):
            raise UnsupportedError(
                "this model's chat template states system messages at the beginning only",
                hint=SEND_ALL,
                details={"field": "messages"},
            )
        if kw["tools"] and self._lacks_tools(recorded, part, messages, kw, codec):
            raise UnsupportedError(
                "the conversation began with other tools, or with none, and this model's chat "
                "template states them at the beginning only",
                hint="send the tools that its first message had, or begin a conversation",
                details={"field": "tools"},
            )
        ids = join(recorded, part, codec)
        if ids is None:
            raise UnsupportedError(
                "the end of the recorded reply and the new message have no tokens in between at "
                "which their texts could be told apart",
                hint=SEND_ALL,
                details={"field": "messages"},
            )
        return ids

    def _lacks_tools(
        self, recorded: TokenArray, part: str, messages: Any, kw: dict[str, Any], codec: Codec
    ) -> bool:
        """Whether the tools of a request are neither in what is recorded nor in the new part."""
        mark = uuid4().hex
        without = {**kw, "tools": None}
        if new_part(lambda found: self.render(found, without), messages, mark) != part:
            return False  # stated with the newest message
        text = codec.decode(recorded.tolist())
        pair = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
        system = [{"role": "system", "content": "b"}]
        for history in (pair, [*system, *pair]):
            try:
                plain, full = (self.render(history, one).split(mark)[0] for one in (without, kw))
            except Exception:  # a template that knows no system messages
                continue
            if not tools_missing((plain, full), text):
                return False
        return True

    def open_end(self, recorded: TokenArray) -> list[int]:
        """The tokens of a turn without the one that ended its reply."""
        ids: list[int] = recorded.tolist()
        ended = ids[-1] in end_tokens(self._chat.tokenizer_manager)
        return ids[:-1] if ended and len(ids) > 1 else ids
