"""The compression map is the demo's, for any tokenizer, and survives file and state dict."""

from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engram.conditional_memory import TokenCompression
from engram.errors import InvalidRequestError

WORDS = ["apple", " apple", "Apple", "APPLE", "\u00e1pple", "a\u0301pple", "\uff41pple", "pear"]
SPACES = [" ", "  ", "\n", "\t \n", "", "\u00a0"]


def word_tokenizer(words: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "pear"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE, as DeepSeek's: ids of single bytes are no whole characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [
        "The cat and the dog, THE Cat; "
        "\u00e9t\u00e9 E\u0301t\u00e9 \u00c9T\u00c9 na\u00efve \u4f60\u597d"
    ] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_special_tokens([AddedToken("<|pad|>", special=True)])
    return tokenizer


def test_spellings_become_one() -> None:
    words = [*WORDS, *SPACES]
    lookup = TokenCompression.from_tokenizer(word_tokenizer(words)).lookup.tolist()
    assert lookup[:8] == [0, 0, 0, 0, 0, 0, 0, 1]
    # All runs of blanks are a lone space; the empty text has itself as key.
    assert lookup[8:12] == [2, 2, 2, 2]
    assert lookup[12] == 3
    assert lookup[13] == 2


def test_new_ids_come_in_first_seen_order() -> None:
    compression = TokenCompression.from_tokenizer(word_tokenizer(["b", "a", "B", "c", "A"]))
    assert compression.lookup.tolist() == [0, 1, 0, 2, 1]
    assert (compression.size, compression.vocab_size) == (3, 5)
    assert compression.reduction == pytest.approx(0.4)


def test_parts_of_characters_stay_apart() -> None:
    tokenizer = byte_tokenizer()
    lookup = TokenCompression.from_tokenizer(tokenizer).lookup
    undecodable = [
        i for i in range(tokenizer.get_vocab_size()) if "\ufffd" in tokenizer.decode([i])
    ]
    assert len(undecodable) > 100
    assert len({int(lookup[i]) for i in undecodable}) == len(undecodable)


def test_it_is_the_map_of_sglang() -> None:
    upstream = pytest.importorskip("sglang.srt.layers.engram")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer())
    expected, size = upstream.build_compressed_token_map(wrapped)
    for tokenizer in (wrapped, wrapped.backend_tokenizer, Slow(wrapped)):
        compression = TokenCompression.from_tokenizer(tokenizer)
        assert compression.lookup.tolist() == expected
        assert compression.size == size < len(wrapped)


class Slow:
    """A tokenizer in plain Python, as `transformers` had them."""

    def __init__(self, wrapped: PreTrainedTokenizerFast) -> None:
        self._wrapped = wrapped

    def __len__(self) -> int:
        return len(self._wrapped)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._wrapped.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return self._wrapped.convert_ids_to_tokens(token_id)


def test_negative_ids_pass_through() -> None:
    compression = TokenCompression(torch.tensor([0, 1, 0]))
    ids = torch.tensor([[2, -1, 1], [-100, 0, 2]], dtype=torch.int32)
    assert compression(ids).tolist() == [[0, -1, 1], [-100, 0, 0]]


def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="token id 3 is beyond the vocabulary of 3"):
        TokenCompression(torch.tensor([0, 1, 0]))(torch.tensor([0, 3]))


@pytest.mark.parametrize("lookup", [[[0]], [], [0, 2], [1], [-1, 0], [0.0, 1.0]])
def test_what_is_no_map_is_refused(lookup: list) -> None:
    with pytest.raises(InvalidRequestError, match="compression map"):
        TokenCompression(torch.tensor(lookup))


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="int is no tokenizer"):
        TokenCompression.from_tokenizer(3)


def test_it_is_frozen_as_a_file(tmp_path: Path) -> None:
    compression = TokenCompression.from_tokenizer(byte_tokenizer())
    compression.save(tmp_path / "map.safetensors")
    loaded = TokenCompression.load(tmp_path / "map.safetensors")
    assert torch.equal(loaded.lookup, compression.lookup)
    assert not list(compression.parameters())
    (tmp_path / "bad").write_bytes(b"nonsense")
    for name in ("bad", "absent"):
        with pytest.raises(InvalidRequestError, match="holds no compression map"):
            TokenCompression.load(tmp_path / name)
