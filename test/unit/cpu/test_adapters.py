"""SGLang's torch backend for LoRA adapters works without an accelerator."""

from __future__ import annotations

import importlib

import torch

from engram.sglang_plugin import cpu
from engram.sglang_plugin.cpu import adapters


def test_adapters_ask_for_no_pinned_memory() -> None:
    cpu.install()
    for name in adapters.MODULES:
        seen = importlib.import_module(name).torch
        tensor = seen.tensor([1, 2], dtype=torch.int32, device="cpu", pin_memory=True)
        assert torch.equal(tensor, torch.tensor([1, 2], dtype=torch.int32))
        assert seen.zeros((2,), pin_memory=True).tolist() == [0, 0]
        assert seen.cumsum is torch.cumsum
