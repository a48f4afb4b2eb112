"""LoRA adapters are told apart by their files, and no other key reads as theirs."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.server_args import ServerArgs

from engram.errors import InvalidRequestError
from engram.sglang_plugin import adapters
from engram.sglang_plugin.adapters import ID_LENGTH, content_id, seed_of, served_by
from engram.sglang_plugin.args import add_flags, apply_flags
from engram.testing.tiny_adapter import write_tiny_adapter
from engram.testing.tiny_model import write_tiny_model

ON = "--enable-snapshot-persistence"
FIRST, SECOND = "a" * ID_LENGTH, "b" * ID_LENGTH


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), "llama", force=True)


@pytest.fixture
def adapter(tmp_path: Path, model: Path) -> Path:
    return write_tiny_adapter(tmp_path / "adapter", model, seed=1)


@pytest.fixture(autouse=True)
def as_at_the_start() -> Iterator[None]:
    yield
    adapters._verify = None


@pytest.mark.parametrize("verify", ["fast", "full"])
def test_an_id_is_that_of_the_files_and_the_name(
    tmp_path: Path, model: Path, adapter: Path, verify: str
) -> None:
    first = content_id("one", str(adapter), verify)
    assert len(first) == ID_LENGTH
    assert content_id("two", str(adapter), verify) != first
    elsewhere = shutil.copytree(adapter, tmp_path / "elsewhere")
    assert content_id("one", str(elsewhere), verify) == first
    write_tiny_adapter(adapter, model, seed=2)
    assert content_id("one", str(adapter), verify) != first


def test_a_changed_configuration_is_another_adapter(adapter: Path) -> None:
    first = content_id("one", str(adapter), "fast")
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 1}))
    second = content_id("one", str(adapter), "fast")
    (adapter / "added_tokens.json").write_text("{}")
    assert len({first, second, content_id("one", str(adapter), "fast")}) == 3


def test_without_persistence_ids_are_those_of_sglang(adapter: Path) -> None:
    def original(name: str, path: str) -> str:
        return f"{name} {path}"

    assert adapters.adapter_id(original, "one", str(adapter)) == f"one {adapter}"
    adapters.name_by_contents("fast")
    found = adapters.adapter_id(original, "one", str(adapter))
    assert found == content_id("one", str(adapter), "fast")


NAMED = '{{"lora_name": "one", "lora_path": "{path}"}}'


@pytest.mark.parametrize("form", ["{path}", "one={path}", NAMED])
def test_an_adapter_that_is_none_is_refused_at_launch(
    tmp_path: Path, adapter: Path, form: str
) -> None:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    if ON not in parser._option_string_actions:
        add_flags(parser)

    def launch(path: Path) -> None:
        given = form.format(path=path)
        options = [ON, "--snapshot-dir", str(tmp_path / "snapshots"), "--lora-paths", given]
        apply_flags(parser.parse_args(["--model-path", "model", *options]))

    launch(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(SystemExit, match="--lora-paths: the model directory holds no weights"):
        launch(adapter)
    with pytest.raises(SystemExit, match=r"--lora-paths: there is no adapter_config\.json"):
        launch(tmp_path)


def test_the_seed_of_page_keys_is_the_one_that_sglang_makes() -> None:
    served = [FIRST, SECOND]
    assert seed_of(None, None, served) is None
    assert seed_of("mine", None, served) == "mine"
    assert seed_of(None, FIRST, served) == FIRST
    assert seed_of("mine", FIRST, served) == "mine" + FIRST
    assert seed_of("mine" + FIRST, SECOND, served) == "mine" + FIRST + SECOND


@pytest.mark.parametrize("extra_key", [FIRST, "mine" + SECOND])
def test_no_extra_key_may_read_as_an_adapter(extra_key: str) -> None:
    with pytest.raises(InvalidRequestError, match="LoRA adapter"):
        seed_of(extra_key, None, [FIRST, SECOND])
    assert seed_of(extra_key, None, []) == extra_key


def test_the_adapters_served_are_those_that_sglang_has() -> None:
    refs = [LoRARef(lora_id=FIRST, lora_name="one"), LoRARef(lora_id=SECOND, lora_name="two")]
    manager = SimpleNamespace(lora_ref_cache={ref.lora_name: ref for ref in refs})
    assert served_by(manager) == (FIRST, SECOND)
    assert served_by(SimpleNamespace(lora_ref_cache={})) == ()
