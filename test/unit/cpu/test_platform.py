"""The platform is offered where only the CPU can serve, and never where there is any doubt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engram.sglang_plugin.cpu import platform

CLASS_PATH = "engram.sglang_plugin.cpu.srt_platform:EngramCpuPlatform"


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any accelerator, whatever the one is like that runs this test."""
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name in ("cuda", "xpu", "mps"):
        monkeypatch.setattr(getattr(torch, name), "is_available", lambda: False)
    for name in ("hip", "musa"):
        monkeypatch.setattr(torch.version, name, None, raising=False)
    monkeypatch.setattr(platform, "_DEVICE_NODES", ())


def test_a_bare_machine_gets_the_platform() -> None:
    assert platform.activate() == CLASS_PATH
    assert platform.is_active()


@pytest.mark.parametrize("name", ["accelerator", "cuda", "xpu", "mps"])
def test_a_usable_accelerator_is_left_to_sglang(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getattr(torch, name), "is_available", lambda: True)
    monkeypatch.setenv("SGLANG_PLATFORM", "engram_cpu")
    assert platform.activate() is None
    assert not platform.is_active()


@pytest.mark.parametrize("name", ["npu", "hpu"])
def test_an_accelerator_of_a_torch_plug_in_is_left_to_sglang(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SimpleNamespace(is_available=lambda: True)
    monkeypatch.setattr(torch, name, device, raising=False)
    assert platform.activate() is None


@pytest.mark.parametrize("name", ["hip", "musa"])
def test_a_torch_built_for_another_accelerator_is_left_to_sglang(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, name, "6.4", raising=False)
    assert platform.activate() is None


def test_a_loaded_driver_is_a_doubt_unless_asked_for_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    node = tmp_path / "nvidiactl"
    node.touch()
    monkeypatch.setattr(platform, "_DEVICE_NODES", (str(node),))
    assert platform.activate() is None
    monkeypatch.setenv("SGLANG_PLATFORM", "engram_cpu")
    assert platform.activate() == CLASS_PATH


def test_a_device_check_that_raises_is_a_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> bool:
        raise RuntimeError("driver initialization failed")

    monkeypatch.setattr(torch.cuda, "is_available", fail)
    assert platform.activate() is None


def test_sglangs_own_cpu_engine_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert platform.activate() is None


def test_another_selected_platform_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLATFORM", "other")
    assert not platform.is_active()
