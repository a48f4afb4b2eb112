"""The whitespace step of scripts/check sees what it should, and mends only that."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whitespace import AS_THEY_ARE, MAX_BYTES, main, mend, problems

MERGE = b"<" * 7 + b" ours\n"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"x = 1 \n", "line 1: blanks at the end"),
        (b"a\n\t\nb\n", "line 2: blanks at the end"),
        (b"a\r\nb\r\n", "carriage return"),
        (b"a", "no newline at the end"),
        (b"a\n\n", "empty lines at the end"),
        (b"\n", "empty lines at the end"),
        (b"a\n" + MERGE + b"b\n", "line 2: unresolved merge"),
        (b"x" * MAX_BYTES + b"\n", "1048577 bytes"),
        (b"\0" * (MAX_BYTES + 1), "1048577 bytes"),
    ],
)
def test_a_problem_is_seen(data: bytes, problem: str) -> None:
    assert [found for found in problems(data) if found.startswith(problem)]


@pytest.mark.parametrize(
    "data", [b"", b"a\n", b"  a\n\nb\n", "\u00fc\n".encode(), b"\0 \r\n", b"\xff \r\n\n"]
)
def test_clean_text_and_other_bytes_are_left_alone(data: bytes) -> None:
    assert problems(data) == []


def test_the_files_of_a_stored_format_are_left_as_they_are() -> None:
    without = [path for path in AS_THEY_ARE.rglob("*.json") if problems(path.read_bytes())]
    assert without, "there is one without a newline at its end"
    before = {path: path.read_bytes() for path in without}
    assert main(["--fix", *map(str, without)]) == 0
    assert {path: path.read_bytes() for path in without} == before


@given(st.text(alphabet="ab \t\r\n").map(str.encode))
def test_mended_text_is_clean_and_keeps_its_words(data: bytes) -> None:
    mended = mend(data)
    assert problems(mended) == []
    assert mend(mended) == mended
    assert mended.split() == data.split()


def test_fix_writes_what_it_can_and_reports_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, binary = tmp_path / "text", tmp_path / "binary"
    text.write_bytes(b"a  \n" + MERGE)
    binary.write_bytes(b"\0 \n\n")
    assert main(["--fix", str(text), str(binary)]) == 1
    assert text.read_bytes() == b"a\n" + MERGE
    assert binary.read_bytes() == b"\0 \n\n"
    assert "line 2: unresolved merge" in capsys.readouterr().out
    assert main([str(binary)]) == 0
