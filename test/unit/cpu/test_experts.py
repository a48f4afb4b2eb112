"""Experts, the product that scores them, and the way of latent attention."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engram.sglang_plugin.cpu import latent_attention
from engram.sglang_plugin.cpu.experts import moe_forward_native

EXPERTS, DIM, INNER, TOKENS = 5, 6, 7, 9


def layer(fused: bool = False, **more: Any) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(1)
    return SimpleNamespace(
        w13_weight=torch.randn(EXPERTS, INNER, DIM, generator=generator),
        w2_weight=torch.randn(EXPERTS, DIM, INNER, generator=generator),
        should_fuse_routed_scaling_factor_in_topk=fused,
        **more,
    )


def routed(seed: int = 2) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, None]]:
    """Tokens and two experts for each; expert 4 has none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, DIM, generator=generator)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(TOKENS)])
    return x, (torch.rand(TOKENS, 2, generator=generator), chosen, None)


def config(activation: str = "relu2", gated: bool = False, factor: float | None = None) -> Any:
    return SimpleNamespace(activation=activation, is_gated=gated, routed_scaling_factor=factor)


def never(*given: object) -> torch.Tensor:
    raise AssertionError(given)


@pytest.mark.parametrize(
    ("factor", "fused", "applied"), [(None, False, 1), (2.5, False, 2.5), (2.5, True, 1)]
)
def test_squared_relu_experts(factor: float | None, fused: bool, applied: float) -> None:
    experts, (x, output) = layer(fused), routed()
    weights, chosen, _ = output
    wanted = torch.zeros(TOKENS, DIM, dtype=torch.float64)
    for token in range(TOKENS):
        for weight, expert in zip(weights[token], chosen[token], strict=True):
            inner = torch.relu(experts.w13_weight[expert].double() @ x[token].double()) ** 2
            wanted[token] += weight * (experts.w2_weight[expert].double() @ inner)
    got = moe_forward_native(never, experts, x, output, config(factor=factor))
    torch.testing.assert_close(got.double(), wanted * applied, rtol=1e-5, atol=1e-5)


def test_a_place_without_a_token_counts_for_nothing() -> None:
    x, (weights, chosen, _) = routed()
    chosen[3] = -1
    got = moe_forward_native(never, layer(), x, (weights, chosen, None), config())
    assert not got[3].any()
    assert got[2].any()


def test_experts_with_biases_are_refused() -> None:
    x, output = routed()
    experts = layer(w13_weight_bias=torch.zeros(EXPERTS, INNER))
    with pytest.raises(NotImplementedError, match="biases"):
        moe_forward_native(never, experts, x, output, config())


@pytest.mark.parametrize(("fused", "applied"), [(False, 1.5), (True, 1)])
def test_gated_experts_are_sglangs_with_the_factor(fused: bool, applied: float) -> None:
    x, output = routed()
    experts, settings = layer(fused), config("silu", gated=True, factor=1.5)

    def upstream(*given: object) -> torch.Tensor:
        assert given == (experts, x, output, settings)
        return x + 1

    got = moe_forward_native(upstream, experts, x, output, settings)
    assert torch.equal(got, (x + 1) * applied)


PRODUCT = """
import torch
from engram.sglang_plugin.cpu import wide_products
a, b = torch.randn(3, 40).bfloat16(), torch.randn(40, 5).bfloat16()
try:
    torch.mm(a, b, out_dtype=torch.float32)
    raise SystemExit("torch has the kernel by now: wide_products is not needed any more")
except NotImplementedError:
    pass
assert wide_products.register() == wide_products.register() == "torch.ops.aten.mm.dtype"
got = torch.mm(a, b, out_dtype=torch.float32)
assert got.dtype == torch.float32
torch.testing.assert_close(got, a.float() @ b.float())
torch.testing.assert_close(torch.mm(a, b).float(), got, rtol=1e-2, atol=0.1)
"""


def test_a_product_wider_than_its_operands() -> None:
    """In a process of its own: a kernel that is registered stays."""
    result = subprocess.run(
        [sys.executable, "-c", PRODUCT], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_latent_attention_is_absorbed_in_prefill_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers

    registry = handlers.AttentionBackendRegistry
    # As upstream leaves it, whatever another test has registered in this process.
    upstream = {name: h for name, h in registry._handlers.items() if h != latent_attention.absorbed}
    monkeypatch.setattr(registry, "_handlers", upstream)
    assert registry.get_handler("torch_native") is registry.get_handler("triton")
    for _ in range(2):
        latent_attention.register()
    chosen = registry.get_handler("torch_native")(object(), object())
    assert chosen is handlers.AttnForwardMethod.MLA
    assert registry.get_handler("triton") is not latent_attention.absorbed
