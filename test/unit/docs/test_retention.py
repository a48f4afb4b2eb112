"""docs/operations.md has every option of `engram retention`."""

import typer
from typer.core import TyperGroup

from engram.cli.main import app
from repository import ROOT
from unit.docs.test_reference import plain, rows


def test_every_option_is_documented() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    options = [parameter.opts[0] for parameter in group.commands["retention"].params]
    page = (ROOT / "docs" / "operations.md").read_text()
    assert [plain(row[0]) for row in rows(page, "What a policy would remove")] == options
