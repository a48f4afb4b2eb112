"""The parts of the demo that need no server; `e2e/test_demo.py` runs the whole."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from engram.testing import demo
from engram.testing.chat import Reply
from engram.testing.demo_report import Outcome, show

REPLY = Reply("ab", (("a", "-0x1p+0", "x"), ("b", "-0x1p-1", "y")), 120, 100, 0.25)
GOOD = Outcome(
    saved={"token_count": 100, "bytes": 4096, "unique_bytes": 1024},
    restore={"token_count": 100, "bytes": 4096, "elapsed_ms": 3.5},
    cold=replace(REPLY, cached_tokens=0),
    warm=REPLY,
    restored=REPLY,
)


def shown(outcome: Outcome, kept: Path | None = None) -> str:
    console = Console(file=io.StringIO(), width=120)
    show(console, outcome, kept)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_an_exact_outcome_says_so() -> None:
    assert GOOD.exact
    text = shown(GOOD)
    assert "bit-identical: yes\n" in text
    assert "cached tokens (restored): 100 = the saved boundary 100" in text


@pytest.mark.parametrize(
    ("outcome", "line"),
    [
        (
            replace(GOOD, restored=replace(REPLY, bits=(REPLY.bits[0], ("b", "-0x1p-2", "y")))),
            "bit-identical: no\n",
        ),
        (replace(GOOD, restored=replace(REPLY, text="ax")), "bit-identical: no\n"),
        (
            replace(GOOD, restored=replace(REPLY, cached_tokens=99)),
            "cached tokens (restored): 99 is not the saved boundary 100",
        ),
        (
            replace(GOOD, warm=replace(REPLY, cached_tokens=0)),
            "cached tokens (warm): 0 is not the saved boundary 100",
        ),
        (replace(GOOD, cold=REPLY), "the cold run reused 100 tokens"),
    ],
)
def test_anything_else_is_told_and_fails(outcome: Outcome, line: str) -> None:
    assert not outcome.exact
    assert line in shown(outcome)


def test_what_to_try_next_names_the_folder_that_was_kept(tmp_path: Path) -> None:
    assert f"--snapshot-dir {tmp_path}/snapshots" in shown(GOOD, tmp_path)
    assert "--dir" in shown(GOOD)


@given(st.text(alphabet="ab\n"), st.integers(1, 6))
def test_the_parts_of_a_text_are_the_text(text: str, count: int) -> None:
    parts = demo.parts(text, count)
    assert len(parts) == count
    assert "".join(parts) == text


def test_parts_end_with_their_lines() -> None:
    assert demo.parts("one\ntwo\nthree\nfour\n", 2) == ["one\ntwo\n", "three\nfour\n"]


def test_a_folder_that_holds_something_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine").touch()
    assert demo.main(["--dir", str(tmp_path / "kept")]) == 1
    assert "is not an empty folder" in capsys.readouterr().out
