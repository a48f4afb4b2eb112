import subprocess
import sys

import numpy as np
import pytest

from engram import EngramConfig, EngramModule
from engram.errors import InvalidRequestError

PRESETS = ["deepseek-v4.1-flash", "deepseek-demo", "engram-27b", "engram-40b"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_overrides(name: str) -> None:
    config = EngramConfig.preset(name, hidden_dim=48, layer_id=None)
    assert config.hidden_dim == 48
    assert config.layer_id == config.layer_ids[0]
    assert config.memory_dim == len(config.orders) * config.num_hash_heads * config.embedding_dim


@pytest.mark.parametrize(
    ("name", "stated"),
    [
        (
            "deepseek-v4.1-flash",
            {
                "layer_ids": (1, 14),
                "orders": (2, 3, 4),
                "num_hash_heads": 8,
                "embedding_dim": 256,
                "embedding_table_size": 16_000_000,
                "compressed_vocab_size": 99_092,
                "pad_id": 2,
                "use_conv": False,
                "bias": False,
            },
        ),
        (
            "deepseek-demo",
            {
                "layer_ids": (1, 15),
                "orders": (2, 3),
                "num_hash_heads": 8,
                "embedding_dim": 64,
                "embedding_table_size": 129280 * 5,
                "pad_id": 2,
                "seed": 0,
                "kernel_size": 4,
                "dilation": 3,
                "hidden_dim": 1024,
                "num_branches": 4,
                "bias": True,
                "gate_transform": "signed_sqrt",
                "zero_init_conv": False,
                "conv_norm_eps": 1e-5,
            },
        ),
        *(
            (
                name,
                {
                    "layer_ids": (2, 15),
                    "orders": (2, 3),
                    "num_hash_heads": 8,
                    "embedding_dim": 80,
                    "embedding_table_size": size,
                    "gate_transform": "identity",
                    "zero_init_conv": True,
                    "kernel_size": 4,
                    "dilation": 3,
                },
            )
            for name, size in (("engram-27b", 2_262_400), ("engram-40b", 7_239_680))
        ),
    ],
)
def test_a_preset_is_what_its_source_states(name: str, stated: dict) -> None:
    config = EngramConfig.preset(name)
    assert {field: getattr(config, field) for field in stated} == stated


def test_an_unknown_preset_and_an_unknown_field_are_named() -> None:
    with pytest.raises(InvalidRequestError, match=r"deepseek-v5.*there are: deepseek-v4\.1-flash"):
        EngramConfig.preset("deepseek-v5")
    with pytest.raises(InvalidRequestError, match="no field 'heads'"):
        EngramConfig.preset("deepseek-demo", heads=3)


def test_the_published_constructor_fields() -> None:
    config = EngramConfig(
        vocab_size=100,
        min_n=2,
        max_n=4,
        num_hash_heads=4,
        embedding_table_size=1000,
        embedding_dim=8,
        hidden_dim=16,
    )
    assert config.orders == (2, 3, 4)
    assert config.table_sizes == (1000, 1000, 1000)
    assert config.memory_dim == 3 * 4 * 8


def test_configs_compare_by_value() -> None:
    a = EngramConfig(embedding_table_size=[100, 200], layer_ids=[3, 1])
    b = EngramConfig(embedding_table_size=(100, 200), layer_ids=(3, 1))
    assert a == b
    assert hash(a) == hash(b)
    assert a.layer_id == 3
    assert a.for_layer(1).layer_id == 1
    assert EngramConfig(embedding_table_size=np.int64(100)) == EngramConfig(
        embedding_table_size=100, layer_ids=np.array([1, 15])
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("max_n", 1),
        ("num_hash_heads", 0),
        ("embedding_table_size", [10, 10, 10]),
        ("embedding_table_size", 1),
        ("layer_ids", []),
        ("layer_ids", [2, 2]),
        ("layer_id", 7),
        ("layout", "other"),
        ("gate_transform", "other"),
        ("compressed_vocab_size", 1 << 40),
        ("seed", -1),
        ("image_token_id", 5),
        ("kernel_size", 0),
        ("conv_dilation", 0),
        ("vocab_size", 100.5),
        ("vocab_size", "100"),
        ("num_hash_heads", True),
        ("pad_id", None),
        ("layer_id", 1.0),
        ("layer_ids", 5),
        ("layer_ids", (1.5, 2)),
        ("embedding_table_size", 100.5),
        ("embedding_table_size", [10.7, 9.2]),
        ("embedding_table_size", "99"),
    ],
)
def test_a_bad_field_is_named(field: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        EngramConfig(**{field: value})
    assert caught.value.details == {"field": field}


def test_the_package_offers_it_lazily_and_without_sglang() -> None:
    source = """
import sys
import engram
assert "torch" not in sys.modules
from engram import EngramConfig, EngramModule
import engram.conditional_memory
assert engram.EngramModule is engram.conditional_memory.EngramModule
assert not [name for name in sys.modules if name.split(".")[0] == "sglang"]
assert "EngramConfig" in dir(engram)
try:
    engram.Nonsense
except AttributeError as error:
    assert "Nonsense" in str(error)
else:
    raise SystemExit("no AttributeError")
"""
    subprocess.run([sys.executable, "-c", source], check=True)
    assert EngramModule.__name__ == "EngramModule"
