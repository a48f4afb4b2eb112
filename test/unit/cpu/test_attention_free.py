"""Only a model without attention heads is kept from SGLang's padding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engram.sglang_plugin.cpu.attention_free import adjust_config_with_unaligned_cpu_tp

UPSTREAM = "sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp"


@pytest.mark.parametrize("heads", [None, 0])
def test_no_heads_are_not_padded(heads: int | None) -> None:
    config = SimpleNamespace(num_attention_heads=heads)
    assert adjust_config_with_unaligned_cpu_tp(config, None, 2) is config
    assert vars(config) == {"num_attention_heads": heads}


def test_heads_are_padded_by_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(UPSTREAM, lambda *given: calls.append(given) or "padded")
    config, load_config = SimpleNamespace(num_attention_heads=6), object()
    assert adjust_config_with_unaligned_cpu_tp(config, load_config, 4) == "padded"
    assert calls == [(config, load_config, 4)]
