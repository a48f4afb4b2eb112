"""What docs/conditional-memory.md shows runs, and its pictures are there."""

import re

import pytest
import torch

import engram.conditional_memory as memory
from repository import ROOT

DOCUMENT = ROOT / "docs" / "conditional-memory.md"


def test_the_examples_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["hidden"].shape == (1, 1, 512)
    assert isinstance(names["gating"], torch.Tensor)
    assert names["state"].length == 100


@pytest.mark.parametrize("name", memory.__all__)
def test_every_public_name_says_what_it_is(name: str) -> None:
    assert (getattr(memory, name).__doc__ or "").strip()


def test_the_backend_is_told() -> None:
    kernel = memory.kernel.load()
    assert memory.backend().startswith("engram_kernel" if kernel else "torch")
    assert kernel or "pip install ./sgl-kernel" in memory.backend()
