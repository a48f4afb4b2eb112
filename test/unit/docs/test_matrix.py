"""The table of families is the one that the recorded results make."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from sglang.srt.arg_groups.overrides import supports_mamba_cache_extra_buffer

from e2e import matrix, test_families
from e2e.exactness import REFUSALS, VARIANTS, Variant
from e2e.matrix import (
    COLUMNS,
    DEVICES,
    DOCUMENT,
    REFUSED,
    ROOT,
    TABLES,
    Recorder,
    documented,
    made,
    pools_of,
    results,
)
from engram.testing.tiny_model import FAMILIES, write_tiny_model


@pytest.mark.parametrize("name", TABLES)
def test_the_table_is_that_of_the_results(name: str) -> None:
    assert documented(name) == made(name)


def test_the_command_that_writes_the_table_runs_as_it_is_documented() -> None:
    """Without what pytest puts on the path."""
    text = DOCUMENT.read_text()
    assert "`python test/e2e/matrix.py`" in text
    command = [sys.executable, "test/e2e/matrix.py", "--check"]
    subprocess.run(command, cwd=ROOT, check=True)


@pytest.mark.parametrize("device", DEVICES)
def test_every_result_is_of_a_variant_and_of_tests_there_are(device: str) -> None:
    served = {variant.name for variant in VARIANTS}
    refused = {refusal.name for refusal in REFUSALS}
    assert not served & refused
    assert set(results(device)) <= served | refused
    columns = [test for tests in COLUMNS.values() for test in tests]
    assert len(set(columns)) == len(columns)
    functions = inspect.getmembers(test_families, inspect.isfunction)
    tests = {name for name, _ in functions if name.startswith("test_")}
    assert {*columns, REFUSED} == tests
    for name, found in results(device).items():
        assert (found["device"] == "CPU") == (device == "cpu")
        if name in refused:
            assert found["refusal"]
            continue
        assert set(found["run"]) <= tests
        assert found["pools"]


@pytest.mark.parametrize(
    "family", [family for family in sorted(FAMILIES) if Variant(family, "float32").has_state]
)
def test_every_family_with_states_is_under_both_strategies_or_sglang_refuses(
    family: str, tmp_path: Path
) -> None:
    """A class is in one of the two lists, as SGLang's own says."""
    config = json.loads((write_tiny_model(tmp_path / "model", family) / "config.json").read_text())
    [name] = config["architectures"]
    supported = supports_mamba_cache_extra_buffer(
        SimpleNamespace(linear_attn_backend="triton"), SimpleNamespace(architectures=[name])
    )
    run = {variant.page is None for variant in VARIANTS if variant.family == family}
    assert run == ({True, False} if supported else {True})
    refused = {one.strategy for one in REFUSALS if one.family == family}
    assert ("extra_buffer" in refused) is not supported
    assert "no_buffer" in refused  # pages above 1


def test_pools_are_named_by_kind_with_their_shapes_and_layers() -> None:
    fields = {
        "page_size": 1,
        "pool.k.1": "F32[2, 16]",
        "pool.k.4": "F32[2, 16]",
        "pool.ssm.0": "F32[4, 8]",
    }
    assert pools_of(fields) == {"k": "2 x F32[2, 16]", "ssm": "1 x F32[4, 8]"}


@pytest.mark.parametrize(("card", "device"), [(None, "cpu"), ("NVIDIA H200", "gpu")])
def test_what_was_run_in_part_or_without_a_server_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: str | None, device: str
) -> None:
    monkeypatch.setattr(matrix, "RESULTS", tmp_path)
    monkeypatch.setattr(matrix, "gpu", lambda: card)
    recorder = Recorder()
    for variant in ("whole", "part", "down"):
        for _ in range(2):
            recorder.expect(variant)
    for variant in ("whole", "down"):
        recorder.found(variant, "test_a", True)
        recorder.found(variant, "test_b", False)
    recorder.found("part", "test_a", True)
    for variant in ("whole", "part"):
        recorder.results[variant].pools = {"k": "1 x F32[2]"}
    recorder.write()
    [path] = tmp_path.glob("*/*")
    assert path == tmp_path / device / "whole.json"
    found = json.loads(path.read_text())
    assert found["device"] == (card or "CPU")
    assert found["passed"] == {"test_a": 1, "test_b": 0}
    assert found["run"] == {"test_a": 1, "test_b": 1}


def test_a_refusal_is_recorded_in_sglangs_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "results")
    recorder = Recorder()
    model = write_tiny_model(tmp_path / "model", "lfm2")
    recorder.refused("lfm2-extra-buffer-1", model, "no")
    recorder.write()
    table = matrix.refusals(["lfm2-extra-buffer-1", "lfm2-no-buffer-16"], results("cpu"))
    assert "| `lfm2-extra-buffer-1` | `Lfm2ForCausalLM` | no | CPU, " in table
    assert "| `lfm2-no-buffer-16` | not run | not run | not run |" in table
