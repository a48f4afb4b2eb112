"""`scripts/demo`, as README has it, with a shorter text."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from repository import ROOT


@pytest.mark.timeout(900)
def test_the_demo_ends_bit_identical(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text((ROOT / "LICENSE").read_text()[:2400])
    result = subprocess.run(
        ["scripts/demo", "--dir", str(tmp_path / "kept"), "--text", str(text)],
        cwd=ROOT,
        env={**os.environ, "ENGRAM_PYTHON": sys.executable},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "bit-identical: yes\n" in result.stdout
    hits = re.findall(r"cached tokens \((\w+)\): (\d+) = the saved boundary (\d+)", result.stdout)
    assert [name for name, _, _ in hits] == ["warm", "restored"]
    assert all(cached == boundary for _, cached, boundary in hits)
    assert int(hits[0][1]) > 2400  # the text, a token a character, and the replies
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert kept == {"model", "snapshots", "server.log"}
