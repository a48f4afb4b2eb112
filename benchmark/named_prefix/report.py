"""What the figures say, as Markdown."""

from __future__ import annotations

from typing import Any


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| restart | system prompt | first token, p50 (ms) | largest (ms) | to named, p50 | "
        "cached tokens, median | least |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, kinds in figures["phases"].items():
        for kind, row in kinds.items():
            ratio = row["p50"] / kinds["named"]["p50"]
            lines.append(
                f"| {name} | {kind} | {row['p50']:.0f} | {row['max']:.0f} | {ratio:.1f} | "
                f"{row['cached_tokens']:.0f} of {row['prompt_tokens']:.0f} | "
                f"{row['least_cached']} |"
            )
    return "\n".join(lines)
