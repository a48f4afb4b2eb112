"""Every relative link of every document leads to a file and, where it names one, to a heading."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from repository import ROOT, repository_files

FENCE = re.compile(r"^ *(```|~~~).*?^ *\1", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`[^`\n]+`")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
LINK = re.compile(
    r"""\]\(\s*<?([^)\s>]+)         # [text](target) and ![text](target "title")
      | ^\s*\[[^\]]+\]:\s+<?(\S+?)>?\s*$  # [label]: target
      | (?:href|src)="([^"]+)"      # the HTML that Markdown lets through
    """,
    re.MULTILINE | re.VERBOSE,
)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def targets(markdown: str) -> Iterator[str]:
    """Yield the relative targets of the links in a document, code left out."""
    prose = INLINE_CODE.sub("`code`", FENCE.sub("", markdown))
    for match in LINK.finditer(prose):
        target = next(group for group in match.groups() if group)
        if not ELSEWHERE.match(target):
            yield target


def anchors(markdown: str) -> set[str]:
    """Return the fragments that lead to a heading, named as code hosts name them."""
    seen: Counter[str] = Counter()
    names = set()
    for heading in HEADING.findall(FENCE.sub("", markdown)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        names.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def broken_links(document: Path, known: set[Path]) -> list[str]:
    """Return the targets in `document` that are no file or folder of `known`, or no heading."""
    broken = []
    for target in targets(document.read_text()):
        name, _, fragment = unquote(target).partition("#")
        path = (document.parent / name).resolve() if name else document
        found = path in known and not name.startswith("/")
        if found and fragment and path.suffix == ".md":
            found = fragment in anchors(path.read_text())
        if not found:
            broken.append(target)
    return broken


def with_folders(files: list[Path]) -> set[Path]:
    return {path for file in files for path in (file, *file.parents)}


def test_every_relative_link_resolves() -> None:
    files = repository_files()
    documents = [path for path in files if path.suffix == ".md"]
    assert len(documents) > 3
    known = with_folders(files)
    broken = {str(path.relative_to(ROOT)): broken_links(path, known) for path in documents}
    assert {name: links for name, links in broken.items() if links} == {}


@pytest.mark.parametrize(
    "link",
    [
        "[text](missing.md)",
        '![picture](missing.png "title")',
        "[text](other.md#no-such-heading)",
        "[text](#no-such-heading)",
        "[text](/other.md)",
        "[text](../outside.md)",
        "[label]: missing.md",
        '<img src="missing.svg">',
        "after `code` [text](missing.md)",
    ],
)
def test_a_broken_link_is_seen(tmp_path: Path, link: str) -> None:
    document, known = sample(tmp_path, f"# Here\n\n{link}\n")
    assert len(broken_links(document, known)) == 1


@pytest.mark.parametrize(
    "link",
    [
        "[text](other.md)",
        "[text](folder)",
        "[text](other.md#the-engram-command-what-it-does)",
        "[text](other.md#twice-1)",
        "[text](#here)",
        "[label]: other.md",
        "[text](https://example.org/missing.md)",
        "[text](mailto:someone@example.org)",
        "`[text](missing.md)`",
        "```\n[text](missing.md)\n```",
    ],
)
def test_a_good_link_is_left_alone(tmp_path: Path, link: str) -> None:
    document, known = sample(tmp_path, f"# Here\n\n{link}\n")
    assert broken_links(document, known) == []


def sample(folder: Path, text: str) -> tuple[Path, set[Path]]:
    """Write a document with `text` and what it may link to; return it and the paths known."""
    document, other, inner = folder / "doc.md", folder / "other.md", folder / "folder" / "a.txt"
    inner.parent.mkdir()
    inner.touch()
    document.write_text(text)
    other.write_text("# The `engram` command: what it does\n\n## Twice\n\n## Twice\n")
    return document, with_folders([document, other, inner])
