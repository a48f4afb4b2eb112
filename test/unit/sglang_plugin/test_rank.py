"""What goes into a rank's namespace beside its weights and pools."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.server_args import ServerArgs

from engram.core.namespace import Namespace
from engram.errors import UnsupportedError
from engram.sglang_plugin import rank as rank_module
from engram.sglang_plugin.rank import (
    CHANGES_THE_MODEL,
    MODEL_CONFIG,
    model_dir,
    model_settings,
    open_rank,
)

SETTINGS: list[tuple[str, object]] = [
    ("json_model_override_args", '{"rope_theta": 5}'),
    ("model_impl", "transformers"),
    ("model_config_parser", "mistral"),
    ("enable_tf32_matmul", True),
    ("quantization_param_path", "scales.json"),
    ("modelopt_quant", "fp8"),
    ("modelopt_checkpoint_restore_path", "checkpoint"),
    ("quantize_and_serve", True),
    ("rl_quant_profile", "profile"),
]


def fields(quantization: str | None = None, **settings: Any) -> Namespace:
    """The fields of a server of the same model with these settings."""
    args = ServerArgs(model_path="a-model", **settings)
    model = SimpleNamespace(quantization=quantization)
    return Namespace(model_settings(args, model))


@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_a_setting_that_changes_the_model_changes_the_namespace(name: str, value: object) -> None:
    differences = fields().difference(fields(**{name: value}))
    assert [field for field, _, _ in differences] == [f"model.{name}"]


def test_every_setting_is_tested() -> None:
    assert {name for name, _ in SETTINGS} == set(CHANGES_THE_MODEL)


def test_a_quantised_model_is_another_one() -> None:
    assert [name for name, _, _ in fields().difference(fields("fp8"))] == ["model.quantization"]
    assert "quantization" in inspect.signature(ModelConfig).parameters


def test_overrides_are_compared_by_what_they_say() -> None:
    first = fields(json_model_override_args='{"a": 1, "b": 2}')
    assert first == fields(json_model_override_args='{"b":2,"a":1}')


def test_a_model_that_generates_nothing_is_refused() -> None:
    """Whether told so by a flag or by its class: what it computes of a prompt must not be cut."""
    assert "is_generation" in inspect.getsource(ModelConfig.__init__)
    token = MODEL_CONFIG.set(SimpleNamespace(is_generation=False))
    try:
        with pytest.raises(UnsupportedError, match="generates nothing"):
            open_rank(None, SimpleNamespace(tp_cache_group=None), None, {"settings": {}})  # type: ignore[arg-type]
    finally:
        MODEL_CONFIG.reset(token)


def test_a_name_of_the_hub_stands_for_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(name: str, **given: Any) -> str:
        asked.append((name, given))
        return "folder"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert rank_module.model_dir("owner/model", "v2") == "folder"
    assert asked == [("owner/model", {"revision": "v2", "local_files_only": True})]


def test_a_directory_is_itself(tmp_path: Any) -> None:
    assert model_dir(str(tmp_path), None) == str(tmp_path)
