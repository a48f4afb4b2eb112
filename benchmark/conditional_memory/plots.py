"""Draw the pictures of docs/conditional-memory.md from the figures that `run` wrote.

Usage: python -m benchmark.conditional_memory.plots [FIGURES.json] [FOLDER]

Needs matplotlib: pip install 'python/[bench]'.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
FIGURES = Path(__file__).with_name("results.json")
FOLDER = ROOT / "docs" / "pictures" / "conditional-memory"

INK, BLUE, ORANGE, GREY = "#1f2430", "#2b6cb0", "#dd7b1f", "#b8bec9"


def idea(folder: Path) -> None:
    """One token's way: from the text to the hidden state."""
    figure, axes = plt.subplots(figsize=(9.6, 3.5))
    axes.set_xlim(0, 96)
    axes.set_ylim(0, 35)
    axes.axis("off")

    def box(x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
        axes.add_patch(
            mpl.patches.FancyBboxPatch(
                (x, y), width, height, boxstyle="round,pad=0.3", fc=colour, ec=INK, lw=0.8
            )
        )
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8.5)

    def arrow(x: float, y: float, to_x: float, to_y: float) -> None:
        style = {"arrowstyle": "-|>", "color": INK, "lw": 0.9}
        axes.annotate("", (to_x, to_y), (x, y), arrowprops=style)

    pale, sand, sky = "#f3f4f7", "#fbe9d5", "#dceaf8"
    for index, word in enumerate(("Alexander", "the", "Great")):
        box(1 + index * 11, 27, 9, 5, word, pale)
        box(1 + index * 11, 18.5, 9, 4.5, str((4711, 12, 903)[index]), pale)
        arrow(5.5 + index * 11, 26.6, 5.5 + index * 11, 23.5)
    axes.text(34, 24.8, "compression:\nspellings become one id", fontsize=7.5, va="center")
    box(9, 10, 11, 5, "2-gram", sky)
    box(23, 10, 11, 5, "3-gram", sky)
    for x, source in ((14.5, 1), (14.5, 2), (28.5, 0), (28.5, 1), (28.5, 2)):
        arrow(5.5 + source * 11, 18, x, 15.6)
    axes.text(1, 7.2, "XOR of id x multiplier,\nmodulo a prime a head", fontsize=7.5, va="center")
    for index in range(8):
        box(44 + index * 3.4, 4 + (index * 5) % 9, 2.6, 1.6, "", sand)
    axes.add_patch(mpl.patches.Rectangle((42.5, 1.5), 29, 14.5, fill=False, ec=INK, lw=0.8))
    axes.text(57, 17.2, "table: one row a head, on disk if need be", ha="center", fontsize=7.5)
    arrow(20.6, 10.8, 42.2, 6)
    arrow(34.6, 12.5, 42.2, 11)
    box(77, 6, 16, 6, "gate: sigmoid of\nkey . hidden state", sky)
    arrow(71.8, 9, 76.6, 9)
    box(77, 20, 16, 5, "hidden state", pale)
    arrow(82, 19.6, 82, 12.7)
    arrow(88.5, 12.5, 88.5, 19.6)
    axes.text(89.3, 16, "+ value,\n+ short conv", fontsize=7.5, va="center")
    save(figure, folder, "idea")


def collisions(folder: Path, figures: dict[str, Any]) -> None:
    """N-grams without a row of their own, against the number of heads."""
    measured = figures["collisions"]
    figure, axes = plt.subplots(figsize=(6, 3.4))
    for key, colour, label in (
        ("same_rows_a_head", BLUE, f"{measured['rows_a_head']:,} rows for each head"),
        ("same_rows_in_all", ORANGE, f"{measured['rows_in_all']:,} rows for all heads together"),
    ):
        points = [(h, v) for h, v in zip(measured["heads"], measured[key], strict=True) if v > 0]
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(measured["heads"], [str(h) for h in measured["heads"]])
    axes.set_xlabel("heads")
    axes.set_ylabel("trigrams without a row of their own")
    axes.legend(frameon=False, fontsize=8)
    save(figure, folder, "collisions")


def speed(folder: Path, figures: dict[str, Any]) -> None:
    """Hashes and gathers of the ways there are."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4))
    hashes = figures["hashes"]["deepseek-v4.1-flash"]["tokens_per_s"]
    bars(left, hashes, "hash, million tokens/s (V4.1, 48 ids a token)")
    bars(right, figures["gathers"]["rows_per_s"], "gather, million rows/s (264 B, 2 GiB table)")
    save(figure, folder, "speed")


def hiding(folder: Path, figures: dict[str, Any]) -> None:
    """A step with rows in memory, from disk when needed, and from disk prefetched."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.4))
    for ax, kind in zip(axes, ("decode", "prefill"), strict=True):
        measured = figures["hiding"][kind]
        ways = measured["step_ms"]
        ax.barh(list(ways)[::-1], list(ways.values())[::-1], color=[BLUE, ORANGE, GREY])
        ax.set_title(f"{kind}: {min(measured['hiding'], 1):.0%} hidden", fontsize=9)
        ax.set_xlabel("ms a step")
    save(figure, folder, "hiding")


def bars(axes: Any, rates: dict[str, float], title: str) -> None:
    names = list(rates)[::-1]
    colours = [BLUE if name.startswith("kernel") else GREY for name in names]
    axes.barh(names, [rates[name] / 1e6 for name in names], color=colours)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7.5)


def save(figure: Any, folder: Path, name: str) -> None:
    figure.tight_layout()
    # Without the version and date, equal figures give equal files.
    metadata = {"Software": None}
    figure.savefig(folder / f"{name}.png", dpi=130, metadata=metadata, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    figures = json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else FIGURES).read_text())
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    mpl.use("Agg")
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    idea(folder)
    for draw in (collisions, speed, hiding):
        draw(folder, figures)


if __name__ == "__main__":
    main()
