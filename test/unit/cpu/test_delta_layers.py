"""What SGLang calls of the delta rules and of the layers around them, against plain formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from engram.sglang_plugin.cpu import (
    delta_projection,
    gated_delta,
    gated_norm,
    kimi_delta,
    output_gates,
    short_conv,
)
from unit.cpu import reference

TOKENS, HEADS, KEY_DIM, VALUE_DIM = 70, 4, 8, 6


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def prefill(seed: int, key_heads: int) -> dict[str, Any]:
    """A prefill of two sequences, of 40 and 30 tokens, with a pool of three states."""
    return {
        "q": normal(seed, 1, TOKENS, key_heads, KEY_DIM),
        "k": normal(seed + 1, 1, TOKENS, key_heads, KEY_DIM),
        "v": normal(seed + 2, 1, TOKENS, HEADS, VALUE_DIM),
        "initial_state": normal(seed + 3, 3, HEADS, VALUE_DIM, KEY_DIM),
        "initial_state_indices": torch.tensor([2, 0], dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, 40, TOKENS], dtype=torch.int32),
        "use_qk_l2norm_in_kernel": True,
    }


def expect(
    given: dict[str, Any], log_decay: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [tokens, heads, value_dim], and the pool after it, in float64."""
    pool, outputs = given["initial_state"].double().clone(), []
    for slot, rows in ((2, range(40)), (0, range(40, TOKENS))):
        for t in rows:
            output, pool[slot] = reference.delta(
                pool[slot], given["q"][0, t], given["k"][0, t], given["v"][0, t], log_decay[t],
                beta[t], KEY_DIM**-0.5,
            )  # fmt: skip
            outputs.append(output)
    return torch.stack(outputs), pool


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-4, atol=1e-4)


def test_a_gated_delta_prefill_equals_the_recurrence() -> None:
    given = prefill(1, key_heads=2)
    A_log, bias = normal(5, HEADS), normal(6, HEADS)
    a, b = normal(7, TOKENS, HEADS), normal(8, TOKENS, HEADS)
    g, beta = gated_delta.fused_gdn_gating(A_log, a, b, bias)
    decay = -A_log.double().exp() * functional.softplus(a.double() + bias.double())
    wanted, pool = expect(given, decay[:, :, None], torch.sigmoid(b.double()))
    outputs, nothing, chunks = gated_delta.chunk_gated_delta_rule(**given, g=g, beta=beta)
    assert nothing is None
    assert_near(outputs[0], wanted)
    assert_near(given["initial_state"], pool)
    assert chunks.shape == (1, 2, HEADS, VALUE_DIM, KEY_DIM)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_a_kimi_delta_prefill_equals_the_recurrence(lower_bound: float | None) -> None:
    given = prefill(2, key_heads=HEADS)
    A_log, bias = normal(5, 1, 1, HEADS, 1), normal(6, HEADS * KEY_DIM)
    raw, beta = normal(7, 1, TOKENS, HEADS, KEY_DIM), normal(8, 1, TOKENS, HEADS)
    value = raw[0].double() + bias.double().view(HEADS, KEY_DIM)
    rate = A_log.double().exp().view(HEADS, 1)
    decay = (
        -rate * functional.softplus(value)
        if lower_bound is None
        else lower_bound * torch.sigmoid(rate * value)
    )
    before = given["initial_state"].clone()
    wanted, pool = expect(given, decay, torch.sigmoid(beta[0].double()))
    tracked = torch.full((2, HEADS, VALUE_DIM, KEY_DIM), float("nan"))
    outputs, chunks = kimi_delta.chunk_kda(
        **given, g=raw, beta=beta, beta_is_raw=True, A_log=A_log, dt_bias=bias,
        lower_bound=lower_bound, output_intermediate_states=True, track_state=tracked,
        track_chunk_idx=torch.tensor([-1, 0]), chunk_indices=None,
    )  # fmt: skip
    assert_near(outputs[0], wanted)
    assert_near(given["initial_state"], pool)
    assert tracked[0].isnan().all()
    assert torch.equal(tracked[1], before[0])
    assert torch.equal(chunks[0], before[[2, 0]])


@pytest.mark.parametrize("is_kda", [False, True])
def test_a_decode_step_continues_a_prefill(is_kda: bool) -> None:
    key_heads = HEADS if is_kda else 2
    given, A_log = prefill(3, key_heads), normal(5, HEADS)
    a = normal(7, 1, TOKENS, HEADS, KEY_DIM) if is_kda else normal(7, TOKENS, HEADS)
    b, bias = normal(8, TOKENS, HEADS), normal(6, HEADS * KEY_DIM if is_kda else HEADS)
    pool = given["initial_state"].clone()
    if is_kda:
        wanted = kimi_delta.chunk_kda(
            **given, g=a, beta=b[None], beta_is_raw=True, A_log=A_log, dt_bias=bias
        )
    else:
        g, beta = gated_delta.fused_gdn_gating(A_log, a, b, bias)
        wanted, _, _ = gated_delta.chunk_gated_delta_rule(**given, g=g, beta=beta)
    assert isinstance(wanted, torch.Tensor)
    for step in range(30):  # the first 30 tokens of both sequences, side by side
        rows = [step, 40 + step]
        output = gated_delta.fused_sigmoid_gating_delta_rule_update(
            A_log=A_log, dt_bias=bias, softplus_beta=1.0, softplus_threshold=20.0,
            q=given["q"][:, rows], k=given["k"][:, rows], v=given["v"][:, rows],
            a=a[:, rows] if is_kda else a[rows], b=b[rows], initial_state_source=pool,
            initial_state_indices=torch.tensor([2, 0]), use_qk_l2norm_in_kernel=True,
            cu_seqlens=torch.arange(3), is_kda=is_kda,
        )  # fmt: skip
        assert_near(output[0], wanted[0, rows])
    assert_near(pool[0], given["initial_state"][0])


def test_calls_that_serving_does_not_make_are_refused() -> None:
    given = prefill(1, key_heads=HEADS)
    gates = {"g": normal(1, 1, TOKENS, HEADS), "beta": normal(2, 1, TOKENS, HEADS)}
    with pytest.raises(NotImplementedError, match="ragged batches"):
        gated_delta.chunk_gated_delta_rule(**{**given, "cu_seqlens": None}, **gates)
    with pytest.raises(NotImplementedError, match="scales q and k itself"):
        gated_delta.chunk_gated_delta_rule(**{**given, "use_qk_l2norm_in_kernel": False}, **gates)
    with pytest.raises(NotImplementedError, match="future_option"):
        kimi_delta.chunk_kda(**given, **gates, future_option=1)
    step = {
        "A_log": normal(1, HEADS), "dt_bias": normal(2, HEADS), "softplus_beta": 1.0,
        "softplus_threshold": 20.0, "q": given["q"][:, :2], "k": given["k"][:, :2],
        "v": given["v"][:, :2], "a": normal(3, 2, HEADS), "b": normal(4, 2, HEADS),
        "initial_state_source": given["initial_state"],
        "initial_state_indices": torch.tensor([0, 1]), "use_qk_l2norm_in_kernel": True,
    }  # fmt: skip
    for name, more in (
        ("disable_state_update", {"disable_state_update": True}),
        ("one token a sequence", {"cu_seqlens": torch.tensor([0, 2])}),
    ):
        with pytest.raises(NotImplementedError, match=name):
            gated_delta.fused_sigmoid_gating_delta_rule_update(**step, **more)


@pytest.mark.parametrize("activation", ["silu", "swish", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_with_a_gate(activation: str, dtype: torch.dtype) -> None:
    layer = SimpleNamespace(
        weight=normal(1, VALUE_DIM), eps=1e-5, activation=activation, norm_before_gate=True,
        group_size=None,
    )  # fmt: skip
    x, gate = normal(2, 12, VALUE_DIM, dtype=dtype), normal(3, 12, VALUE_DIM, dtype=dtype)
    value = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    opened = torch.sigmoid(gate.double())
    wanted = value * layer.weight.double() * opened * (1 if activation == "sigmoid" else gate)
    for got in (
        gated_norm.fused_rms_norm_gated_forward(
            layer, x, gate.view(3, 4, VALUE_DIM)[:, :, :].reshape(12, -1)
        ),
        gated_norm.rms_norm_gated_forward(layer, x, gate),
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(
            got.double(), wanted, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5
        )
    with pytest.raises(NotImplementedError, match="no residual"):
        gated_norm.fused_rms_norm_gated_forward(layer, x, gate, residual=x)
    layer.norm_before_gate = False
    with pytest.raises(NotImplementedError, match="gate after it"):
        gated_norm.rms_norm_gated_forward(layer, x, gate)


def test_gates_on_outputs() -> None:
    x, gate = normal(1, 5, 8), normal(2, 5, 2, 4)
    wanted = x * torch.sigmoid(gate.reshape(5, 8))
    assert_near(output_gates.fused_sigmoid_mul(x, gate), wanted)
    assert not torch.equal(x, wanted)
    assert output_gates.fused_sigmoid_mul(x, gate, inplace=True) is x
    assert_near(x, wanted)
    with pytest.raises(NotImplementedError, match="does not quantise"):
        output_gates.fused_sigmoid_mul(x, gate, quant=True)
    column = normal(3, 5, 1)
    assert_near(output_gates.sigmoid_gate_mul_broadcast(x, column), x * torch.sigmoid(column))
    hidden, weight, total = normal(4, 5, 6), normal(5, 6), normal(6, 5, 8)
    shared = x * torch.sigmoid(hidden @ weight[:, None])
    assert_near(output_gates.fused_gate_sigmoid_mul(hidden, weight, x), shared)
    wanted = total + shared
    output_gates.fused_gate_sigmoid_mul_add(hidden, weight, x, total)
    assert_near(total, wanted)


def test_both_layouts_of_the_projections_give_the_same_parts() -> None:
    keys, values = 2, 4
    q, k = normal(1, 5, keys, KEY_DIM), normal(2, 5, keys, KEY_DIM)
    v, z = normal(3, 5, values, VALUE_DIM), normal(4, 5, values, VALUE_DIM)
    b, a = normal(5, 5, values), normal(6, 5, values)
    sizes = (keys, values, KEY_DIM, VALUE_DIM)

    def grouped(part: torch.Tensor) -> torch.Tensor:
        return part.reshape(5, keys, -1)

    together = torch.cat([grouped(part) for part in (q, k, v, z)], 2).reshape(5, -1)
    of_heads = torch.cat([grouped(b), grouped(a)], 2).reshape(5, -1)
    by_head = delta_projection.fused_qkvzba_split_reshape_cat(together, of_heads, *sizes)
    flat = [part.reshape(5, -1) for part in (q, k, v, z)]
    contiguous = delta_projection.fused_qkvzba_split_reshape_cat_contiguous(
        torch.cat(flat, 1), torch.cat([b, a], 1), *sizes
    )
    for mixed, gate, strength, decay in (by_head, contiguous):
        assert torch.equal(mixed, torch.cat(flat[:3], 1))
        assert torch.equal(gate, z)
        assert torch.equal(strength, b)
        assert torch.equal(decay, a)


def test_short_convolutions_never_take_the_fused_kernels() -> None:
    x = normal(1, 4, 2048)
    assert not short_conv.can_dispatch_fused_lfm_short_conv(x, x, x, normal(2, 2048, 3), None, x)
