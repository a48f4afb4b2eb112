"""What is replaced in SGLang: in a process of its own, for nothing of it may reach other tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from engram.sglang_plugin import cpu
from engram.sglang_plugin.cpu import platform
from engram.sglang_plugin.cpu.patches import Patch, apply_patch

INSTALL = """
import json, operator, sys
import torch
from engram.sglang_plugin import cpu
from engram.sglang_plugin.cpu import patches
from sglang.srt.platforms import current_platform

from sglang.srt.layers.attention.linear import gdn_backend, kda_backend  # callers, before it

def in_place(patch):
    value = operator.attrgetter(patch.name)(sys.modules[patch.module])
    if not patch.around:
        return value
    assert value.args[0].__module__ == patch.module, "SGLang's own, bound once"
    return value.func

first, second = cpu.install(), cpu.install()
from sglang.srt.models import falcon_mamba, lfm2  # and after it
from engram.sglang_plugin.cpu import causal_conv, gated_delta, selective_state
tensor = torch.zeros(2)
print(json.dumps({
    "first": first,
    "second": second,
    "in_place": all(
        in_place(patch) is patch.replacement for patch in patches.PATCHES
    ),
    "callers": [
        gdn_backend.causal_conv1d_fn is causal_conv.causal_conv1d_fn,
        gdn_backend.fused_gdn_gating is gated_delta.fused_gdn_gating,
        kda_backend.causal_conv1d_update is causal_conv.causal_conv1d_update,
        lfm2.causal_conv1d_fn is causal_conv.causal_conv1d_fn,
        sys.modules[falcon_mamba.MambaMixer1.__module__].selective_state_update
        is selective_state.selective_state_update,
    ],
    "platform": {
        "class": type(current_platform).__name__,
        "out_of_tree": current_platform.is_out_of_tree(),
        "device": current_platform.get_device(),
        "attention": current_platform.get_default_attention_backend(),
        "extra_buffer": current_platform.support_mamba_cache_extra_buffer(),
        "triton": current_platform.capabilities.supports_triton,
        "same_tensor": tensor.pin_memory() is tensor,
        "device_module": torch.get_device_module().__name__,
    },
}))
"""

OPS = "sglang.kernels.ops."
MAMBA_OPS = [
    f"{OPS}mamba.{name}" for name in ("causal_conv1d_triton", "triton_ops", "lfm_short_conv")
]
LINEAR = f"{OPS}attention.linear."
KERNELS = "sglang.srt.layers.attention.linear.kernels."


def report() -> dict[str, Any]:
    """Install in a fresh process and tell what is there then."""
    package = Path(__file__).parents[3] / "python"
    result = subprocess.run(
        [sys.executable, "-c", INSTALL],
        env={**os.environ, "PYTHONPATH": str(package), "SGLANG_PLATFORM": platform.ENTRY_POINT},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return document


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without accelerator")
def test_install_replaces_what_a_cpu_lacks() -> None:
    found = report()
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
        "sglang.srt.model_executor.model_runner.adjust_config_with_unaligned_cpu_tp",
        *(
            f"{home}.causal_conv1d_{name}"
            for home in ("sglang.srt.layers.attention.mamba.causal_conv1d", MAMBA_OPS[0])
            for name in ("fn", "update")
        ),
        f"{MAMBA_OPS[1]}.selective_state_update",
        f"{MAMBA_OPS[2]}.can_dispatch_fused_lfm_short_conv",
        f"{OPS}attention.fla.chunk.chunk_gated_delta_rule",
        f"{OPS}attention.fla.kda.chunk_kda",
        f"{LINEAR}fused_sigmoid_gating_recurrent.fused_sigmoid_gating_delta_rule_update",
        f"{LINEAR}fused_gdn_gating.fused_gdn_gating",
        f"{KERNELS}gdn_triton.TritonGDNKernel.supports_packed_decode",
        f"{KERNELS}kda_triton.TritonKDAKernel.supports_packed_decode",
        f"{OPS}attention.triton_gdn_fused_proj.fused_qkvzba_split_reshape_cat",
        f"{OPS}attention.triton_gdn_fused_proj.fused_qkvzba_split_reshape_cat_contiguous",
        f"{OPS}attention.fla.fused_norm_gate.FusedRMSNormGated.forward",
        f"{OPS}attention.fla.layernorm_gated.RMSNorm.forward",
        *(
            f"{OPS}elementwise.elementwise.{name}"
            for name in (
                "fused_sigmoid_mul",
                "sigmoid_gate_mul_broadcast",
                "fused_gate_sigmoid_mul",
                "fused_gate_sigmoid_mul_add",
            )
        ),
        "sglang.srt.layers.moe.fused_moe_native.moe_forward_native",
        "torch.Tensor.pin_memory",
        "torch.get_device_module",
        "torch.ops.aten.mm.dtype",
        "sglang.srt.models.deepseek_common.attention_backend_handler"
        ".AttentionBackendRegistry[torch_native]",
        "sglang.srt.lora.layers.torch",
        "sglang.srt.lora.backend.torch_backend.torch",
    ]
    assert found["second"] == found["first"]
    assert found["in_place"]
    assert all(found["callers"]), found["callers"]
    assert found["platform"] == {
        "class": "EngramCpuPlatform",
        "out_of_tree": True,
        "device": "cpu",
        "attention": "torch_native",
        "extra_buffer": True,
        "triton": False,
        "same_tensor": True,
        "device_module": "torch.cpu",
    }


def test_install_leaves_other_platforms_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    before = (torch.Tensor.pin_memory, torch.get_device_module)
    assert cpu.install() == []
    assert (torch.Tensor.pin_memory, torch.get_device_module) == before


@pytest.mark.parametrize(
    ("patch", "missing"),
    [
        (Patch("no_such_module", "dumps", "json.dumps", print), "no_such_module"),
        (Patch("json", "dumps", "no_such_module.f", print), "no_such_module"),
        (Patch("json", "dumps", "json.no_such_name", print), "json.no_such_name"),
        (Patch("json", "dumps", "json.loads", print), "json.dumps that is json.loads"),
    ],
)
def test_a_missing_name_says_which_and_which_version_is_supported(
    patch: Patch, missing: str
) -> None:
    with pytest.raises(RuntimeError) as caught:
        apply_patch(patch)
    assert f"SGLang has no {missing}," in str(caught.value)
    assert "sglang==0.5.23" in str(caught.value)
    assert json.dumps is not print


def test_a_name_that_sglang_leaves_undefined_is_defined() -> None:
    module = ModuleType("holder")
    sys.modules["holder"] = module
    try:
        assert apply_patch(Patch("holder", "dumps", "json.dumps", print)) == "holder.dumps"
    finally:
        del sys.modules["holder"]
    assert module.dumps is print
