"""What the figures say, as Markdown."""

from __future__ import annotations

from typing import Any

FAMILIES = {
    "granite-hybrid": "Mamba-2 and attention",
    "qwen3-next": "gated delta rule and attention",
    "mamba2": "Mamba-2 alone",
}
SHOWN = {
    "no cache": "stock, `--disable-radix-cache`",
    "cache": "stock, with its cache",
    "stateful": "Engram, stateful",
    "history": "Engram, whole history sent",
}


def ways_in(found: dict[str, Any]) -> list[str]:
    """The ways that were measured in every family."""
    return [way for way in SHOWN if all(way in rows for rows in found.values())]


def total(found: dict[str, Any]) -> dict[str, Any]:
    """Way -> the sums over all families."""
    made: dict[str, Any] = {}
    for way in ways_in(found):
        rows = [family[way] for family in found.values()]
        made[way] = {
            "requests": sum(row["requests"] for row in rows),
            "failures": sum(len(row["failures"]) for row in rows),
            "same": sum(row["same"] for row in rows),
            **{
                phase: {name: sum(row[phase][name] for row in rows) for name in rows[0][phase]}
                for phase in ("before", "after")
            },
        }
    return made


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown: all families together, then what each computes less."""
    sums = total(found)
    without = sums["no cache"]
    lines = [
        "| way | requests | failures | sent | computed, turns 1 to 10 | computed, turns 11 to 20, "
        "after a restart | computed in all | fewer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, row in sums.items():
        figures = [row["before"]["sent"] + row["after"]["sent"]]
        figures += [row["before"]["computed"], row["after"]["computed"], _computed(row)]
        shown = " | ".join(f"{one:,}" for one in figures)
        lines.append(
            f"| {SHOWN[way]} | {row['requests']} | {row['failures']} | {shown} | "
            f"{_fewer(row, without)} |"
        )
    lines += ["", f"| family | {' | '.join(SHOWN[way] for way in ways_in(found)[1:])} |"]
    lines.append("|---" * len(sums) + "|")
    for family, rows in found.items():
        cells = [_fewer(rows[way], rows["no cache"]) for way in ways_in(found)[1:]]
        lines.append(f"| {family} ({FAMILIES[family]}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def _computed(row: dict[str, Any]) -> int:
    computed: int = row["before"]["computed"] + row["after"]["computed"]
    return computed


def _fewer(row: dict[str, Any], without: dict[str, Any]) -> str:
    return f"{100 * (1 - _computed(row) / _computed(without)):.1f} %"
