"""A character tokenizer for tiny test models: every id is a piece of plain ASCII text.

- Each printable ASCII character, tab, newline and carriage return is a token of its own, so such
  text survives a round trip, and the ids of generated text are the ids of that text read again.
- Any other character is escaped: each of its UTF-8 bytes becomes the token `<0xNN>`, which decodes
  to those six characters (`é` comes back as `<0xC3><0xA9>`). Nothing is dropped or unknown.
- Special tokens are `<|endoftext|>`, `<|pad|>` and one a chat role; as text they are what they say.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
ROLES = ("system", "user", "assistant", "tool")

CHARACTERS = [chr(code) for code in (0x09, 0x0A, 0x0D, *range(0x20, 0x7F))]
BYTES = [f"<0x{code:02X}>" for code in range(256) if chr(code) not in CHARACTERS]
SPECIALS = [END_OF_TEXT, PAD, *(f"<|{role}|>" for role in ROLES)]

# A conversation renders as the concatenation of its messages: adding one changes no text before it.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role: ' ~ message.role) }}"
    "{% endif %}"
    "{{ '<|' ~ message.role ~ '|>' ~ (message.content or '') }}"
    "{% if message.role == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer; ids are specials, then characters, then byte escapes."""
    vocab = {text: index for index, text in enumerate([*SPECIALS, *CHARACTERS, *BYTES])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    # Fuse alone: with ByteFallback the byte tokens would turn back into non-ASCII text.
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=SPECIALS[2:],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
