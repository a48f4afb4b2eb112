"""Hashes are the published ones, bit by bit, on every backend."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.conditional_memory import EngramConfig, NgramHashLayout, TokenCompression
from engram.conditional_memory.primes import is_prime, next_prime
from engram.errors import InvalidRequestError, UnsupportedError


def small(**fields: object) -> EngramConfig:
    values: dict = {"vocab_size": 500, "embedding_table_size": 97, "num_hash_heads": 3}
    return EngramConfig(**{**values, **fields})


def plain_hash(ids: list[int], config: EngramConfig, layout: NgramHashLayout, layer: int) -> list:
    """The demo's facts in Python's own integers: one text to [T][orders * heads]."""
    multipliers = [int(m) for m in layout.multipliers(layer)]
    rows = []
    for t in range(len(ids)):
        row = []
        for index, order in enumerate(config.orders):
            mix = 0
            for k in range(order):
                token = ids[t - k] if t >= k else config.pad_id
                mix ^= token * multipliers[k]
            row += [mix % int(prime) for prime in layout.primes(layer)[index]]
        rows.append(row)
    return rows


class TestPublishedNumbers:
    def test_v41(self) -> None:
        layout = NgramHashLayout(EngramConfig.preset("deepseek-v4.1-flash"))
        assert [layout.rows(1), layout.rows(14)] == [384_006_168, 384_016_682]
        assert layout.primes(1)[0][0] == 16_000_057
        assert layout.multipliers(1).tolist() == [
            76632096046245,
            4839876093313,
            35959672319349,
            73987337458391,
        ]

    def test_demo(self) -> None:
        layout = NgramHashLayout(EngramConfig.preset("deepseek-demo"))
        assert layout.primes(1)[0][:2].tolist() == [646403, 646411]
        assert [layout.rows(1), layout.rows(15)] == [10_344_164, 10_348_242]

    @pytest.mark.parametrize(("name", "billions"), [("engram-27b", 5.792), ("engram-40b", 18.534)])
    def test_paper(self, name: str, billions: float) -> None:
        config = EngramConfig.preset(name)
        layout = NgramHashLayout(config)
        assert config.memory_dim == 1280
        rows = sum(layout.rows(layer) for layer in config.layer_ids)
        assert round(rows * config.embedding_dim / 1e9, 3) == billions


class TestAgainstSglang:
    """`compute_engram_hash_ids` of SGLang 0.5.23, with the layout it makes itself."""

    @pytest.mark.parametrize("layers", [(1, 14), (14, 1), (3, 5, 2)])
    @pytest.mark.parametrize("max_n", [2, 3, 4, 5])
    @pytest.mark.parametrize("negative", [False, True])
    def test_equal(
        self, layers: tuple[int, ...], max_n: int, negative: bool, backend: str, seed: int
    ) -> None:
        upstream = pytest.importorskip("sglang.srt.layers.engram")
        vocab, heads, pad = 1000, 8, 2
        theirs = upstream.EngramLayout.from_config(
            SimpleNamespace(
                engram_layer_ids=layers,
                engram_max_ngram_size=max_n,
                engram_n_heads=heads,
                engram_vocab_size=5000,
                engram_num_embeddings=[0] * len(layers),
                engram_head_dim=4,
            )
        )
        primes = torch.tensor(theirs.primes)
        offsets = torch.tensor([theirs.column_bounds(i)[:-1] for i in range(len(layers))])
        multipliers = upstream.compute_hash_multipliers(layers, max_n, vocab)
        # It reads negative ids from the map's end: there they map to themselves.
        token_map = torch.cat([torch.arange(vocab), torch.arange(-50, 0)])
        config = EngramConfig(
            vocab_size=vocab,
            max_n=max_n,
            num_hash_heads=heads,
            embedding_table_size=5000,
            layer_ids=layers,
            pad_id=pad,
            layout="v41",
        )
        layout = NgramHashLayout(config)
        low = -50 if negative else 0
        for length in (0, 1, 2, 3, 7, 40):
            ids = torch.randint(low, vocab, (2, length))
            steps = torch.arange(length)[:, None] - torch.arange(max_n)
            windows = ids[:, steps.clamp_min(0)]
            blocked = (steps < 0).expand_as(windows)
            for index, layer in enumerate(layers):
                ours = layout.hash(ids, layer, backend=backend)
                for row in range(2):
                    expected = upstream.compute_engram_hash_ids(
                        windows[row],
                        blocked[row],
                        pad,
                        token_map,
                        multipliers,
                        primes,
                        offsets,
                    )
                    assert torch.equal(ours[row], expected[:, index])

    def test_an_image_token_ends_every_ngram(self, backend: str, seed: int) -> None:
        upstream = pytest.importorskip("sglang.srt.layers.engram")
        image, pad, vocab, max_n = 7, 2, 50, 4
        config = small(
            vocab_size=vocab, max_n=max_n, layout="v41", image_token_id=image, pad_id=pad
        )
        layout = NgramHashLayout(config)
        ids = torch.randint(0, vocab, (1, 200))
        ids[torch.rand(1, 200) < 0.2] = image
        steps = torch.arange(200)[:, None] - torch.arange(max_n)
        windows = ids[0, steps.clamp_min(0)]
        blocked = ((steps < 0) | (windows == image)).int().cummax(-1).values.bool()
        for layer in config.layer_ids:
            expected = upstream.compute_engram_hash_ids(
                windows,
                blocked,
                pad,
                torch.arange(vocab),
                torch.tensor(layout.multipliers(layer))[None],
                torch.tensor(layout.primes(layer))[None],
                torch.tensor(layout.offsets(layer))[None],
            )
            got = layout.hash(ids, layer, backend=backend)
            assert torch.equal(got[0], expected[:, 0])


@given(
    ids=st.lists(st.integers(-500, 499), max_size=12),
    orders=st.sampled_from([(1, 1), (2, 2), (2, 3), (3, 5), (1, 4)]),
    heads=st.integers(1, 9),
    size=st.sampled_from([2, 11, 4000, 5000, 646400, 16_000_000, 3_000_000_000, 1 << 40]),
    pad=st.integers(0, 499),
    layers=st.permutations([0, 1, 15]),
)
@settings(max_examples=60)
def test_every_backend_is_the_plain_hash(
    ids: list[int],
    orders: tuple[int, int],
    heads: int,
    size: int,
    pad: int,
    layers: list[int],
) -> None:
    from engram.conditional_memory import kernel

    config = small(
        min_n=orders[0],
        max_n=orders[1],
        num_hash_heads=heads,
        embedding_table_size=size,
        pad_id=pad,
        layer_ids=layers,
    )
    layout = NgramHashLayout(config)
    backends = ["numpy", "torch", *(["kernel"] if kernel.load() else [])]
    for layer in layers:
        expected = plain_hash(ids, config, layout, layer)
        for backend in backends:
            batch = np.array([ids, ids[::-1]], dtype=np.int64)
            got = layout.hash(batch, layer, with_offsets=False, backend=backend)
            assert got.dtype == np.int64
            assert got[0].tolist() == expected
            with_offsets = layout.hash(batch, layer, backend=backend)
            assert np.array_equal(with_offsets, got + layout.offsets(layer))
            assert got.size == 0 or with_offsets.max() < layout.rows(layer)


@pytest.mark.parametrize("size", [2, 11, 4099, 16_000_000, (1 << 31) + 11, 1 << 45])
def test_remainders_are_exact_at_the_edges(size: int, backend: str) -> None:
    """Ids whose product lies beside a multiple of a prime, up to the ends of 64 bits."""
    config = small(min_n=1, max_n=1, num_hash_heads=8, embedding_table_size=size, layer_ids=[0])
    layout = NgramHashLayout(config)
    (multiplier,) = layout.multipliers(0)
    inverse = pow(int(multiplier), -1, 1 << 64)
    edges = [0, 1, -1, (1 << 63) - 1, -(1 << 63), (1 << 62) + 12345]
    for prime in layout.primes(0).ravel().tolist():
        for quotient in (1, 2, 1000, ((1 << 63) - 1) // prime, -((1 << 63) // prime)):
            edges += [quotient * prime + d for d in (-1, 0, 1)]
    edges = [edge for edge in edges if -(1 << 63) <= edge < 1 << 63]
    # The multiplier is odd, so some id wraps to each product.
    wrapped = [edge * inverse % (1 << 64) for edge in edges]
    ids = np.array(wrapped, dtype=np.uint64).astype(np.int64)
    got = layout.hash(ids[None], 0, with_offsets=False, backend=backend)
    primes = layout.primes(0).ravel().tolist()
    assert got[0].tolist() == [[edge % prime for prime in primes] for edge in edges]


def test_the_order_of_layers_decides_the_primes() -> None:
    a = NgramHashLayout(small(layer_ids=(1, 15)))
    b = NgramHashLayout(small(layer_ids=(15, 1)))
    assert a.primes(1).tolist() == b.primes(15).tolist()
    assert a.primes(1).tolist() != b.primes(1).tolist()
    assert a.multipliers(1).tolist() == b.multipliers(1).tolist()


def test_sizes_of_orders_may_differ() -> None:
    layout = NgramHashLayout(small(embedding_table_size=(100, 7), layer_ids=[4]))
    assert layout.primes(4).tolist() == [[101, 103, 107], [7, 11, 13]]
    assert layout.offsets(4).tolist() == [0, 101, 204, 311, 318, 329]
    assert layout.rows(4) == 342


def test_the_pad_and_the_ids_are_compressed(backend: str) -> None:
    lookup = torch.tensor([0, 1, 2, 0, 1, 3])
    compression = TokenCompression(lookup)
    config = small(vocab_size=6, pad_id=5)
    compressed = NgramHashLayout(config, compression)
    assert compressed.pad_id == 3
    assert compressed.config.compressed_vocab_size == 4
    plain = NgramHashLayout(small(vocab_size=6, compressed_vocab_size=4, pad_id=3))
    ids = torch.tensor([[3, 4, 5, -1, 2]])
    expected = plain.hash(torch.tensor([[0, 1, 3, -1, 2]]), 15, backend=backend)
    assert torch.equal(compressed.hash(ids, 15, backend=backend), expected)


def test_another_compressed_size_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="compresses to 2 ids, the config states 3"):
        NgramHashLayout(
            small(compressed_vocab_size=3), TokenCompression(torch.tensor([0, 1, 1, 0]))
        )


def test_polynomial(backend: str) -> None:
    """Facts of the early library: bases from 31 + 100 h, moduli from size + 1000 h, pad 0."""
    config = small(layout="polynomial", max_n=4, embedding_table_size=500, pad_id=9)
    layout = NgramHashLayout(config)
    assert layout.primes(1).tolist() == [[503, 1511, 2503]] * 3
    ids = [5, 499, 17, 3, 250]
    bases = [31, 131, 233]
    expected = []
    for t in range(len(ids)):
        padded = [0, 0, 0, *ids][t : t + 4]
        expected.append(
            [
                sum(token * base**j for j, token in enumerate(padded[4 - n :])) % modulus % 500
                for n in (2, 3, 4)
                for base, modulus in zip(bases, (503, 1511, 2503), strict=True)
            ]
        )
    got = layout.hash([ids], 15, with_offsets=False, backend=backend)
    assert got[0].tolist() == expected
    assert layout.rows(1) == 9 * 500
    assert np.array_equal(layout.hash([ids], 1, backend=backend), got + np.arange(9) * 500)


def test_primes_agree_with_a_sieve() -> None:
    sieve = [True] * 5000
    sieve[:2] = [False, False]
    for i in range(2, 71):
        for j in range(i * i, 5000, i):
            sieve[j] = False
    assert [is_prime(i) for i in range(5000)] == sieve
    # Strong pseudoprimes to the first bases, and a product of two large primes.
    for composite in (2047, 3215031751, 3825123056546413051, 1000003 * 999983):
        assert not is_prime(composite)
    assert is_prime((1 << 61) - 1)


def test_heads_never_share_a_prime() -> None:
    layout = NgramHashLayout(small(layer_ids=range(20), embedding_table_size=50, num_hash_heads=4))
    primes = [p for layer in range(20) for p in layout.primes(layer).ravel().tolist()]
    assert primes == sorted(set(primes))
    for low, high in pairwise(primes):
        assert next_prime(low + 1) == high


@pytest.mark.parametrize(
    "ids", [[1, 2], [[1.5]], torch.zeros(2, 3), torch.zeros(1, 2, 3, dtype=torch.long), [["a"]]]
)
def test_what_is_no_batch_of_ids_is_refused(ids: object) -> None:
    with pytest.raises(InvalidRequestError, match="token ids"):
        NgramHashLayout(small()).hash(ids)


def test_a_layer_without_memory_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"layer 2 has no memory.*\(1, 15\)"):
        NgramHashLayout(small()).hash([[1]], 2)


def test_arrays_of_any_layout(backend: str) -> None:
    layout = NgramHashLayout(small())
    ids = np.arange(24).reshape(2, 12)
    expected = layout.hash(ids[:, ::-1].copy(), backend=backend)
    assert np.array_equal(layout.hash(ids[:, ::-1], backend=backend), expected)
    assert np.array_equal(layout.hash(ids.astype(">i4")[:, ::-1], backend=backend), expected)
    whole = torch.tensor(ids[:, ::-1].copy())
    assert np.array_equal(layout.hash(whole.T.contiguous().T, backend=backend), expected)
    frozen = np.broadcast_to(np.arange(5), (2, 5))
    assert np.array_equal(layout.hash(frozen, backend=backend), layout.hash(frozen.tolist()))
    assert layout.hash(torch.zeros(0, 5, dtype=torch.long), backend=backend).shape == (0, 5, 6)


@pytest.mark.parametrize(
    "window",
    [
        torch.zeros(1, 8, dtype=torch.int32),
        torch.zeros(1, 8),
        torch.zeros(1, 1, dtype=torch.int64),
        torch.zeros(8, dtype=torch.int64),
    ],
    ids=["int32", "float", "short", "flat"],
)
def test_what_is_no_window_is_refused(window: torch.Tensor, backend: str) -> None:
    """In torch an int32 window hashed elsewhere, as its products were cut to 32 bits."""
    with pytest.raises(InvalidRequestError, match="a window is int64"):
        NgramHashLayout(small()).hash_window(window, backend=backend)


def test_an_unknown_backend_or_dtype_of_rows_is_refused(backend: str) -> None:
    layout = NgramHashLayout(small())
    with pytest.raises(InvalidRequestError, match="there are: numpy, torch, kernel"):
        layout.hash([[1]], backend="cuda")
    with pytest.raises(InvalidRequestError, match=r"int64 or int32, not torch\.int16"):
        layout.hash_window(torch.zeros(1, 8, dtype=torch.int64), backend=backend, dtype=torch.int16)


@pytest.mark.parametrize("kind", ["official", "polynomial"])
def test_a_table_beyond_int64_is_refused(kind: str) -> None:
    config = small(
        layout=kind, min_n=2, max_n=2, num_hash_heads=1, embedding_table_size=(1 << 63) - 1
    )
    with pytest.raises(UnsupportedError, match=r"more than 2\^63 rows"):
        NgramHashLayout(config)


def test_int32_rows(backend: str, seed: int) -> None:
    layout = NgramHashLayout(small())
    window = layout.window(layout.start(3), torch.randint(0, 500, (3, 9)))
    wide = layout.hash_window(window, 1, backend=backend)
    narrow = layout.hash_window(window, 1, backend=backend, dtype=torch.int32)
    assert narrow.dtype == torch.int32
    assert torch.equal(narrow.long(), wide)
    big = NgramHashLayout(small(embedding_table_size=1 << 30))
    with pytest.raises(InvalidRequestError, match="do not fit int32"):
        big.hash_window(window, 1, backend=backend, dtype=torch.int32)
