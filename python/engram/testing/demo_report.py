"""What the demo shows at its end: the table, the verdict, and what to try next."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engram.testing.chat import Reply

WITHOUT_DIR = """\
  scripts/demo --dir demo       the same, and keep the model, the store and the log in ./demo
  {engram} doctor
  docs/getting-started.md       your own model, curl and the openai client
"""
WITH_DIR = """\
  {engram} doctor --snapshot-dir {folder}/snapshots
  {python} -m sglang.launch_server --model-path {folder}/model \\
      --enable-snapshot-persistence --snapshot-dir {folder}/snapshots \\
      --mamba-scheduler-strategy no_buffer --disable-radix-cache --port 30000
  curl -s localhost:30000/list_snapshots -H 'content-type: application/json' \\
      -d '{{"conversation_id": "demo"}}'
  docs/http-api.md lists the other routes
"""


@dataclass(frozen=True)
class Outcome:
    """The replies of the save and restore routes, and the next turn three times."""

    saved: dict[str, Any]
    restore: dict[str, Any]
    cold: Reply
    warm: Reply
    restored: Reply

    @property
    def boundary(self) -> int:
        """Tokens that the save acknowledged."""
        return int(self.saved["token_count"])

    @property
    def bit_identical(self) -> bool:
        """Whether text and log-probabilities are those of the server that never stopped."""
        return self.restored.bits == self.warm.bits and self.restored.text == self.warm.text

    @property
    def reused(self) -> bool:
        """Whether both served exactly the saved tokens from memory, and the cold run none."""
        hits = (self.warm.cached_tokens, self.restored.cached_tokens, self.cold.cached_tokens)
        return hits == (self.boundary, self.boundary, 0)

    @property
    def exact(self) -> bool:
        """What the demo promises."""
        return self.bit_identical and self.reused


def show(console: Console, outcome: Outcome, kept: Path | None) -> None:
    """Print table, verdict and next steps; `kept` is the folder that stays, if one does."""
    console.print()
    console.print(_table(outcome))
    for name in ("warm", "restored"):
        reply: Reply = getattr(outcome, name)
        same = "=" if reply.cached_tokens == outcome.boundary else "is not"
        console.print(
            f"cached tokens ({name}): {reply.cached_tokens} {same} "
            f"the saved boundary {outcome.boundary}"
        )
    if outcome.cold.cached_tokens:
        console.print(f"the cold run reused {outcome.cold.cached_tokens} tokens: no comparison")
    console.print(
        f"compared: {len(outcome.warm.bits)} tokens with the log-probabilities of each and of "
        f"its {len(outcome.warm.bits[0]) - 2} best rivals"
    )
    console.print(f"[bold]bit-identical: {_yes(outcome.bit_identical)}[/]")
    console.print("\nTo try next:")
    steps = (WITH_DIR if kept else WITHOUT_DIR).format(
        python=sys.executable, engram=Path(sys.executable).with_name("engram"), folder=kept
    )
    console.print(steps, markup=False, end="", soft_wrap=True)


def _table(outcome: Outcome) -> Table:
    table = Table(title="The next turn", caption=_caption(outcome), caption_justify="left")
    table.add_column("")
    table.add_column("cold: computed\nfrom nothing", justify="right")
    table.add_column("warm: server\nnever stopped", justify="right")
    table.add_column("restored after\nkill -9", justify="right")
    replies = (outcome.cold, outcome.warm, outcome.restored)
    same = _yes(outcome.bit_identical)
    table.add_row("prompt tokens", *(f"{r.prompt_tokens:,}" for r in replies))
    table.add_row("cached tokens", *(f"{r.cached_tokens:,}" for r in replies))
    table.add_row("computed tokens", *(f"{r.prompt_tokens - r.cached_tokens:,}" for r in replies))
    table.add_row("time to first token", *(f"{r.first_token_s * 1e3:,.0f} ms" for r in replies))
    table.add_row("bytes read back", "-", "-", f"{outcome.restore['bytes']:,}")
    table.add_row("restore call", "-", "-", f"{outcome.restore['elapsed_ms']:,.0f} ms")
    table.add_row("reply begins", *(escape(repr(r.text[:12])) for r in replies))
    table.add_row("bit-identical to warm", "-", "-", same)
    return table


def _caption(outcome: Outcome) -> str:
    return (
        f"The snapshot has {outcome.saved['bytes']:,} bytes, {outcome.saved['unique_bytes']:,} of "
        "them new with its turn. The model's weights are random: the replies mean nothing, but "
        "they hang on every bit of the state."
    )


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
