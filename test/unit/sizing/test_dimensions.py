"""The sizes of public models, against figures that others worked out or published."""

from pathlib import Path
from typing import Any

import pytest

from engram.errors import InvalidRequestError, NotFoundError, UnsupportedError
from engram.sizing import ARCHITECTURES, ModelSize, read_config
from engram.snapshot.segment import SegmentHeader, Shard
from unit.sizing.samples import NAMES, fields, sized, sized_fields

# Bytes of one state in bf16 and float32, worked out by hand from the dimensions; recurrent and
# attention layers; bytes of KV a token.
TABLE = {
    "granite-4.0-h-350m": (22_321_152, 28, 4, 4 * 2 * 4 * 64 * 2),
    "granite-4.0-h-1b": (57_341_952, 36, 4, 4 * 2 * 4 * 128 * 2),
    "granite-4.0-h-tiny": (57_341_952, 36, 4, 4 * 2 * 4 * 128 * 2),
    "granite-4.0-h-small": (152_819_712, 36, 4, 4 * 2 * 8 * 128 * 2),
    "codestral-mamba-7b": (272_367_616, 64, 0, 0),
    "nemotron-cascade-2-30b": (49_082_368, 23, 6, 6 * 2 * 2 * 128 * 2),
    "nemotron-3-super-120b": (170_229_760, 40, 8, 8 * 2 * 2 * 128 * 2),
    "qwen3-next-80b-a3b": (77_266_944, 36, 12, 12 * 2 * 2 * 256 * 2),
    "falcon-h1-1.5b": (76_013_568, 24, 24, 24 * 2 * 2 * 128 * 2),
    "falcon-mamba-7b": (64 * (8192 * 16 * 4 + 8192 * 3 * 2), 64, 0, 0),
    "kimi-linear-48b-a3b": (
        20 * (32 * 128 * 128 * 4 + 3 * 32 * 128 * 3 * 2),
        20,
        7,
        7 * (512 + 64) * 2,
    ),
    "lfm2-1.2b": (10 * 2048 * 2 * 2, 10, 6, 6 * 2 * 8 * 64 * 2),
    "llama-3.1-8b": (0, 0, 32, 32 * 2 * 8 * 128 * 2),
}


def test_every_configuration_is_in_the_table() -> None:
    assert sorted(TABLE) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_public_model_has_the_size_of_its_dimensions(name: str) -> None:
    size = sized(name)
    found = (size.state_bytes, size.recurrent_layers, size.attention_layers)
    assert (*found, size.kv_bytes_per_token) == TABLE[name]


@pytest.mark.parametrize(
    ("name", "ranks", "published"),
    [
        ("granite-4.0-h-tiny", 1, 56e6),
        ("granite-4.0-h-tiny", 4, 14e6),
        ("granite-4.0-h-small", 1, 146 * 2**20),
        ("codestral-mamba-7b", 1, 260 * 2**20),
        ("nemotron-cascade-2-30b", 1, 47 * 2**20),
        ("qwen3-next-80b-a3b", 4, 19e6),
    ],
)
def test_published_sizes_of_a_state_agree(name: str, ranks: int, published: float) -> None:
    assert sized(name, ranks).state_bytes == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(
    ("name", "published"), [("nemotron-3-super-120b", 5.3e9), ("qwen3-next-80b-a3b", 23.7e9)]
)
def test_two_published_figures_are_of_pools_not_of_states(name: str, published: float) -> None:
    assert published > 30 * sized(name).state_bytes


def test_dtypes_count() -> None:
    wide = sized("granite-4.0-h-350m", conv="float32", state="float32", kv="float32")
    usual = sized("granite-4.0-h-350m")
    half = sized("granite-4.0-h-350m", state="bfloat16")
    windows = sum(b.bytes for b in usual.buffers if b.part == "conv0")
    states = sum(b.bytes for b in usual.buffers if b.part == "ssm")
    assert usual.state_bytes == windows + states
    assert wide.state_bytes == 2 * windows + states
    assert half.state_bytes == windows + states // 2
    assert wide.kv_bytes_per_token == 2 * usual.kv_bytes_per_token


def test_the_state_takes_its_dtype_from_the_configuration_where_sglang_lets_it() -> None:
    chosen = fields("qwen3-next-80b-a3b") | {"mamba_ssm_dtype": "bfloat16"}
    assert sized_fields(chosen).state_dtype == "BF16"
    ignored = fields("granite-4.0-h-tiny") | {"mamba_ssm_dtype": "bfloat16"}
    assert sized_fields(ignored).state_dtype == "F32"


def test_a_hybrid_grows_with_its_tokens_and_a_pure_mamba_does_not() -> None:
    hybrid, pure = sized("granite-4.0-h-tiny"), sized("codestral-mamba-7b")
    grown = hybrid.snapshot_bytes(2_000) - hybrid.snapshot_bytes(1_000)
    assert grown == 1_000 * hybrid.kv_bytes_per_token > 0
    assert pure.snapshot_bytes(2_000) == pure.snapshot_bytes(1_000) == pure.state_bytes
    assert hybrid.snapshot_bytes(10, states=3) == 3 * hybrid.state_bytes + 10 * 8192


def test_capacity_is_what_fits() -> None:
    size = sized("granite-4.0-h-tiny")
    one = size.snapshot_bytes(100)
    assert [size.capacity(room, 100) for room in (one - 1, one, 3 * one + 5)] == [0, 1, 3]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 4096])
def test_segment_files_have_those_bytes_and_little_more(name: str, tokens: int) -> None:
    size = sized(name)
    digest = "0" * 64
    rows = [(b.name, b.dtype, (tokens, *b.shape)) for b in size.buffers if b.per_token]
    state = [(b.name, b.dtype, (1, *b.shape)) for b in size.buffers if not b.per_token]
    headers = [
        SegmentHeader.plan(
            shard=Shard(digest, 0, 1),
            key=digest,
            start=start,
            end=tokens,
            parent=digest if start else None,
            has_state=start > 0,
            buffers=buffers,
        )
        for start, buffers in ((0, rows), (tokens, state))
        if buffers or not start
    ]
    files = sum(header.file_length for header in headers)
    prefixes = [len(header.prefix) for header in headers]
    beside = files - size.snapshot_bytes(tokens) - 4 * tokens
    assert 0 < beside <= 64 * (len(size.buffers) + 1) + sum(prefixes) + 32 * len(headers)
    assert max(prefixes) <= 32 << 10


def test_an_unknown_architecture_is_named() -> None:
    values = fields("llama-3.1-8b") | {"architectures": ["Gemma3ForCausalLM"]}
    with pytest.raises(UnsupportedError, match="Gemma3ForCausalLM") as caught:
        sized_fields(values)
    assert all(name in caught.value.hint for name in ARCHITECTURES)


@pytest.mark.parametrize("name", NAMES)
def test_every_field_of_a_configuration_that_is_taken_away_is_missed_or_has_a_default(
    name: str,
) -> None:
    values = fields(name)
    whole = sized(name)
    for field in values.keys() - {"model_type", "architectures"}:
        found = outcome({key: value for key, value in values.items() if key != field})
        if isinstance(found, str):
            assert field in found
        else:
            # A default, another field that says the same, or one that counts for nothing.
            assert found.state_bytes == whole.state_bytes
            assert found.recurrent_layers == whole.recurrent_layers


def outcome(values: dict[str, Any]) -> ModelSize | str:
    """The size, or what is wrong with the configuration."""
    try:
        return sized_fields(values)
    except InvalidRequestError as error:
        return error.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": []}, "names no architecture"),
        ({"architectures": None}, "names no architecture"),
        ({"mamba_n_heads": 0}, "'mamba_n_heads' must be a whole number above 0, not 0"),
        ({"mamba_n_heads": True}, "not True"),
        ({"mamba_d_state": "128"}, "not '128'"),
        ({"layer_types": ["mamba", "rnn"]}, "layer 1 is of unknown kind 'rnn'"),
        ({"layer_types": "mamba"}, "'layer_types' must be a list of words"),
        ({"layer_types": []}, "describes a model without a state"),
        ({"torch_dtype": "int4"}, "a pool of 'int4' is not known"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        sized_fields(fields("granite-4.0-h-tiny") | change)


def test_heads_wider_than_the_model_are_no_model() -> None:
    values = {"hidden_size": 1, "num_attention_heads": 2, "head_dim": None}
    with pytest.raises(InvalidRequestError, match="without a state"):
        sized_fields(fields("llama-3.1-8b") | values)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("falcon-mamba-7b", {"num_hidden_layers": 10**9}, "1000000000 layers"),
        ("llama-3.1-8b", {"num_hidden_layers": 10**400}, "'num_hidden_layers' is above"),
        ("granite-4.0-h-tiny", {"layer_types": ["mamba"] * 10_001}, "10001 layers"),
        ("granite-4.0-h-tiny", {"mamba_d_state": 10**400}, "'mamba_d_state' is above"),
    ],
)
def test_numbers_that_no_model_has_take_no_memory(
    name: str, change: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        sized_fields(fields(name) | change)


@pytest.mark.parametrize(
    ("name", "ranks", "message"),
    [
        ("granite-4.0-h-tiny", 5, "3072 channels cannot be divided among 5 ranks"),
        ("codestral-mamba-7b", 3, "8 groups cannot be divided among 3 ranks"),
        ("llama-3.1-8b", 3, "8 KV heads cannot be divided among 3 ranks"),
        ("granite-4.0-h-tiny", 0, "must be above 0"),
    ],
)
def test_ranks_that_do_not_divide_the_model_are_refused(
    name: str, ranks: int, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        sized(name, ranks)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InvalidRequestError, match=r"is not (JSON|a JSON object)"):
        read_config(tmp_path)


def test_a_directory_without_a_configuration_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"config\.json cannot be read"):
        read_config(tmp_path)
