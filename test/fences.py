"""The fenced blocks of Markdown documents, with the mark that says how a test runs them.

| mark | run by |
|---|---|
| `test` | `unit/docs/test_commands.py`: needs nothing |
| `server` | `e2e/test_docs_commands.py`: needs the server of README on port 30000 |
| `make-model`, `launch` | the same, to get there |
| `agents` | `e2e/test_agents.py`: needs a server with agents on port 30000 |
| `agent-tools` | the same, which loads it as a module |
"""

import re
from dataclasses import dataclass
from pathlib import Path

from repository import ROOT, repository_files

_FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: `language` and `mark` are the words behind the fence."""

    document: str
    language: str
    mark: str
    code: str

    def __str__(self) -> str:
        return f"{self.document}: {self.code.splitlines()[0]}"


def blocks_of(document: str, markdown: str) -> list[Block]:
    found = []
    for match in _FENCE.finditer(markdown):
        language, _, mark = match["info"].partition(" ")
        found.append(Block(document, language, mark.strip(), match["code"]))
    return found


# In the order in which a reader meets them: some go on from what those before have made.
_FIRST = ["README.md", "docs/getting-started.md", "docs/http-api.md"]


def documents() -> list[Path]:
    """README and everything in docs/, the guides first."""
    names = {str(path.relative_to(ROOT)): path for path in repository_files()}
    users = [name for name in names if name == "README.md" or name.startswith("docs/")]
    rest = sorted(name for name in users if name.endswith(".md") and name not in _FIRST)
    return [names[name] for name in [*_FIRST, *rest]]


def blocks(mark: str | None = None) -> list[Block]:
    """All blocks, or those with a mark."""
    found = [
        block
        for path in documents()
        for block in blocks_of(str(path.relative_to(ROOT)), path.read_text())
    ]
    return [block for block in found if mark is None or block.mark == mark]
