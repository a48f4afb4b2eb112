"""The figures of docs/sizing.md are the ones that the code comes to."""

import re

import typer
from typer.core import TyperGroup

from engram.cli.main import app
from engram.cli.size import shown
from engram.sizing import ARCHITECTURES
from repository import ROOT
from unit.docs.test_reference import plain, rows
from unit.sizing.samples import NAMES, sized

PAGE = (ROOT / "docs" / "sizing.md").read_text()


def test_the_table_is_what_the_code_says() -> None:
    table = rows(PAGE, "Sizes of public models")
    documented = {plain(row[1]): [plain(cell) for cell in row[2:]] for row in table}
    assert sorted(documented) == NAMES
    for name, cells in documented.items():
        size = sized(name)
        assert cells == [
            f"{size.recurrent_layers} + {size.attention_layers}",
            f"{size.state_bytes:,}",
            shown(size.state_bytes),
            f"{size.kv_bytes_per_token:,}",
            *(shown(size.snapshot_bytes(tokens)) for tokens in (1024, 8192, 65_536)),
        ]


def test_the_figures_in_the_text_are_what_the_code_says() -> None:
    text = PAGE.replace("\n", " ")
    tiny, nemotron, qwen = map(
        sized, ("granite-4.0-h-tiny", "nemotron-3-super-120b", "qwen3-next-80b-a3b")
    )
    for size, model in (
        (tiny, "Granite-4.0-H-Tiny"),
        (nemotron, "Nemotron-3-Super-120B"),
        (qwen, "Qwen3-Next-80B-A3B"),
    ):
        even = round(size.state_bytes / size.kv_bytes_per_token)
        assert f"{even:,} for {model}" in text
    assert f"{shown(nemotron.state_bytes)} and {shown(qwen.state_bytes)}." in text
    conversation, states = tiny.snapshot_bytes(8192, states=10), 10 * tiny.state_bytes
    assert f"take {shown(conversation)}, of which {shown(states)} are states" in text


def test_every_option_is_documented() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    options = [option for parameter in group.commands["size"].params for option in parameter.opts]
    assert [plain(row[0]) for row in rows(PAGE, "The command")] == options


def test_every_architecture_is_named() -> None:
    text = PAGE.split("Any other architecture than these")[1]
    assert re.findall(r"`(\w+)`", text) == list(ARCHITECTURES)


def test_bytes_are_shown_in_powers_of_1024() -> None:
    assert [shown(n) for n in (0, 1023, 1024, 1 << 20, 3 << 29, 1 << 40)] == [
        "0 B",
        "1,023 B",
        "1.0 KiB",
        "1.0 MiB",
        "1.5 GiB",
        "1,024.0 GiB",
    ]
