"""docs/store-tools.md has every option of the store's commands, every field of their objects."""

from dataclasses import fields

import pytest
import typer
from typer.core import TyperArgument, TyperGroup

from engram.cli.main import app
from engram.upkeep.collect import StoreCollection
from engram.upkeep.findings import Kind, StoreCheck
from repository import ROOT
from unit.docs.test_reference import plain, rows

PAGE = (ROOT / "docs" / "store-tools.md").read_text()
TABLES = {
    "fsck": ("Is everything whole", "option"),
    "gc": ("What nothing names", "option"),
    "export": ("Export and import", "option of export"),
    "import": ("Export and import", "option of import"),
}


def table(heading: str, first: str) -> list[list[str]]:
    """The rows under a heading of the table whose first column is called so."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return rows("# x\n" + section[section.index(f"| {first} |") :], "x")


@pytest.mark.parametrize("command", TABLES)
def test_every_option_is_documented(command: str) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    options: list[str] = []
    for parameter in group.commands[command].params:
        if isinstance(parameter, TyperArgument):
            assert parameter.metavar is not None
            options.append(parameter.metavar.strip("[]"))
        else:
            options += parameter.opts
    documented = [name for row in table(*TABLES[command]) for name in plain(row[0]).split("`, `")]
    assert sorted(documented) == sorted(options)


def test_every_field_of_a_check_is_documented() -> None:
    cells = [plain(row[0]) for row in table("Is everything whole", "in the object")]
    documented = [name for cell in cells for name in cell.split("`, `")]
    assert sorted(documented) == sorted(["healthy", *(field.name for field in fields(StoreCheck))])
    assert all(f"`{kind.value}`" in PAGE for kind in Kind)


def test_every_field_of_a_collection_is_documented() -> None:
    (text,) = [row[1] for row in table("What nothing names", "option") if plain(row[0]) == "--json"]
    assert all(f"`{field.name}`" in text for field in fields(StoreCollection))
