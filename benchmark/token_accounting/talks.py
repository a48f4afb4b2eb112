"""The conversations: about the documents of this repository, the same for every way."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TURNS = 20
REQUESTS = 271
"""Of one way, over all families: as many conversations of 20 turns as that is, the last shorter."""
OPENING = 1000
"""Characters of a document that the first message quotes."""
LINE = 110
"""Most characters of a later message."""


@dataclass(frozen=True)
class Talk:
    """What a user says, turn by turn, about one document."""

    name: str
    messages: tuple[str, ...]


def documents() -> list[Path]:
    """Those that are long enough, by name."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [path for path in paths if len(_lines(path)) >= TURNS]


def talk_about(path: Path, turns: int) -> Talk:
    """A conversation about a document: its opening, then line after line of the rest."""
    text = path.read_text()
    opening = f"This is how {path.name} begins:\n{text[:OPENING]}\nWhat is it about?"
    return Talk(path.stem, (opening, *_lines(path)[: turns - 1]))


def talks_of(family: int, families: int, requests: int = REQUESTS) -> list[Talk]:
    """The conversations of one family of several; those of all together have `requests` turns."""
    lengths = [TURNS] * (requests // TURNS)
    if requests % TURNS:
        lengths.append(requests % TURNS)
    chosen = zip(documents(), lengths, strict=False)
    found = [talk_about(path, turns) for path, turns in chosen]
    if sum(len(talk.messages) for talk in found) != requests:
        raise ValueError(f"the documents are too few for {requests} requests")
    return found[family::families]


def _lines(path: Path) -> list[str]:
    """What is said of a document after its opening, in pieces of at most `LINE` characters."""
    rest = path.read_text()[OPENING:]
    return textwrap.wrap(rest, LINE)
