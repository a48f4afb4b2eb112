"""Find, and with --fix mend, whitespace that differs for no reason; find unresolved merges.

Usage: whitespace.py [--fix] [FILE ...]      (no FILE: the whole repository)
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from repository import ROOT, repository_files

# Seven at the start of a line, and spelled so that this file does not match itself.
MERGE_MARKER = re.compile(rb"^(?:<{7}|>{7}) ", re.MULTILINE)
MAX_BYTES = 1 << 20
# Files of a format whose every byte counts.
AS_THEY_ARE = ROOT / "test" / "data" / "store-v1" / "store"


def mend(data: bytes) -> bytes:
    """Return `data` with line feeds only, no blanks at line ends and one newline at the end."""
    lines = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    body = b"\n".join(line.rstrip(b" \t") for line in lines).rstrip(b"\n")
    return body + b"\n" if body else b""


def problems(data: bytes) -> list[str]:
    """Return what is wrong with a file's content, each in a few words; [] if nothing is.

    Bytes that are no UTF-8 text are held to the size limit alone.
    """
    found = []
    if len(data) > MAX_BYTES:
        found.append(f"{len(data)} bytes; the repository takes files up to {MAX_BYTES}")
    if not is_text(data):
        return found
    if b"\r" in data:
        found.append("carriage return; use line feeds only")
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.rstrip(b"\r") != line.rstrip(b"\r").rstrip(b" \t"):
            found.append(f"line {number}: blanks at the end of the line")
    if data and not data.endswith(b"\n"):
        found.append("no newline at the end of the file")
    if data.endswith(b"\n\n") or data == b"\n":
        found.append("empty lines at the end of the file")
    if marker := MERGE_MARKER.search(data):
        line_number = data.count(b"\n", 0, marker.start()) + 1
        found.append(f"line {line_number}: unresolved merge")
    return found


def is_text(data: bytes) -> bool:
    """Return whether `data` is UTF-8 without NUL bytes."""
    if b"\0" in data:
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    """Check or fix the named files; return 1 if something is left to mend, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fix", action="store_true", help="mend what can be mended")
    parser.add_argument("files", nargs="*", type=Path, help="default: the whole repository")
    options = parser.parse_args(arguments)
    left = 0
    for path in options.files or repository_files():
        if AS_THEY_ARE in path.absolute().parents:
            continue
        data = path.read_bytes()
        if options.fix and is_text(data) and mend(data) != data:
            data = mend(data)
            path.write_bytes(data)
            print(f"mended {display(path)}")
        for problem in problems(data):
            left += 1
            print(f"{display(path)}: {problem}")
    return 1 if left else 0


def display(path: Path) -> str:
    """Return the path as a reader at the repository's root would type it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    sys.exit(main())
