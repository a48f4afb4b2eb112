"""What is replaced in SGLang, in a process of its own: nothing of it may leak into other tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

INSTALL = """
import json, sys
import torch
from engram.sglang_plugin import cpu
from engram.sglang_plugin.cpu import patches

pin_memory = torch.Tensor.pin_memory
first, second = cpu.install(), cpu.install()
in_place = all(
    getattr(sys.modules[patch.module], patch.name) is patch.replacement
    for patch in patches.MAMBA2_PATCHES
) if first else None
tensor = torch.zeros(2)
platform = None
if first:
    from sglang.srt.platforms import current_platform
    platform = {
        "class": type(current_platform).__name__,
        "out_of_tree": current_platform.is_out_of_tree(),
        "attention": current_platform.get_default_attention_backend(),
        "extra_buffer": current_platform.support_mamba_cache_extra_buffer(),
        "triton": current_platform.capabilities.supports_triton,
        "same_tensor": tensor.pin_memory() is tensor,
    }
print(json.dumps({
    "first": first, "second": second, "in_place": in_place, "platform": platform,
    "pinned": torch.Tensor.pin_memory is not pin_memory,
}))
"""

MISSING = """
import sys
from engram.sglang_plugin.cpu import patches
from engram.sglang_plugin.cpu.patches import Patch, _apply
for name in ("sglang.srt.no_such_module.f", "json.no_such_name"):
    module, _, attribute = name.rpartition(".")
    try:
        _apply(Patch(module, attribute, print))
    except RuntimeError as error:
        print(error)
"""


def run(program: str, **environment: str) -> str:
    package = Path(__file__).parents[3] / "python"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(package), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def report(**environment: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run(INSTALL, **environment).splitlines()[-1])
    return document


def test_install_replaces_what_a_cpu_lacks() -> None:
    if torch.accelerator.is_available():
        assert report()["first"] == []
        return
    found = report(SGLANG_PLATFORM="engram_cpu")
    mixer = "sglang.srt.layers.attention.mamba.mamba."
    backend = "sglang.srt.layers.attention.hybrid_linear_attn_backend."
    assert found["first"] == [
        mixer + "causal_conv1d_fn",
        mixer + "causal_conv1d_fn_triton",
        mixer + "causal_conv1d_update",
        mixer + "causal_conv1d_update_triton",
        mixer + "mamba_chunk_scan_combined",
        mixer + "selective_state_update",
        backend + "track_mamba_states_if_needed",
        backend + "track_mamba_states_all_layers",
        "torch.Tensor.pin_memory",
    ]
    assert found["second"] == found["first"]
    assert found["in_place"]
    assert found["platform"] == {
        "class": "EngramCpuPlatform",
        "out_of_tree": True,
        "attention": "torch_native",
        "extra_buffer": True,
        "triton": False,
        "same_tensor": True,
    }


def test_install_leaves_other_platforms_alone() -> None:
    found = report(SGLANG_USE_CPU_ENGINE="1")
    assert found["first"] == found["second"] == []
    assert not found["pinned"]


def test_a_missing_name_says_which_and_which_version_is_supported() -> None:
    lines = run(MISSING).splitlines()
    for line, name in zip(lines, ["sglang.srt.no_such_module.f", "json.no_such_name"], strict=True):
        assert f"has no {name}" in line
        assert "sglang==0.5.23" in line
