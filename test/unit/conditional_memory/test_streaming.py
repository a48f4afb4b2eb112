import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.conditional_memory import EngramConfig, HashStream, NgramHashLayout
from engram.errors import InvalidRequestError


def layout(**fields: object) -> NgramHashLayout:
    values: dict = {"vocab_size": 60, "embedding_table_size": 97, "num_hash_heads": 2, "max_n": 4}
    return NgramHashLayout(EngramConfig(**{**values, **fields}))


@given(
    steps=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), max_size=8),
    kind=st.sampled_from(["official", "v41", "polynomial"]),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=60)
def test_pieces_hash_like_the_whole(steps: list, kind: str, seed: int) -> None:
    """Whatever was pushed and taken back: the text that is left hashes as if it came at once."""
    image = 3 if kind == "v41" else None
    hashes = layout(layout=kind, image_token_id=image)
    random = torch.Generator().manual_seed(seed)
    stream = HashStream(hashes, 2, max_rollback=3)
    text = torch.zeros(2, 0, dtype=torch.int64)
    got = torch.zeros(2, 0, hashes.config.num_columns, dtype=torch.int64)
    kept = 0
    for pushed, taken_back in steps:
        ids = torch.randint(0, 60, (2, pushed), generator=random)
        text = torch.cat([text, ids], dim=1)
        got = torch.cat([got, hashes.hash_window(stream.push(ids), 15)], dim=1)
        kept = min(kept + pushed, 3)
        if taken_back <= kept:
            stream.rollback(taken_back)
            text = text[:, : text.shape[1] - taken_back]
            got = got[:, : text.shape[1]]
            kept -= taken_back
        else:
            with pytest.raises(InvalidRequestError, match="cannot take back"):
                stream.rollback(taken_back)
        assert stream.length == text.shape[1]
    assert torch.equal(got, hashes.hash(text, 15))


def test_another_batch_size_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="3 texts"):
        HashStream(layout(), 2).push(torch.zeros(3, 1, dtype=torch.int64))


@pytest.mark.parametrize("values", [(1, -1), (-1, 3)])
def test_negative_sizes_are_refused(values: tuple[int, int]) -> None:
    """With -1 to take back, n-grams of the next piece would have missed a token."""
    with pytest.raises(InvalidRequestError, match="at least 0"):
        HashStream(layout(), values[0], max_rollback=values[1])


def test_memory_is_bounded() -> None:
    stream = HashStream(layout(), 1, max_rollback=5)
    for _ in range(50):
        assert stream.push(torch.zeros(1, 7, dtype=torch.int64)).shape == (1, 10)
    assert stream._history.shape == (1, 8)
    assert stream._history.untyped_storage().nbytes() == 64
