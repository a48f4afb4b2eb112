"""Rooms say what they are, and import only what the contracts in pyproject.toml allow."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from repository import ROOT, repository_files

PACKAGE = ROOT / "python" / "engram"
LINT = """
import sys
from importlinter.cli import lint_imports
sys.exit(lint_imports(config_filename=sys.argv[1], no_cache=True, no_logo=True))
"""
ROOMS = "Rooms import only the rooms below them"
SEAM = "Only sglang_plugin imports sglang"
LIGHT = "core and client run without torch and sglang"

# As the contracts name them: a room added there is in the samples too.
SAMPLE_ROOMS = set(re.findall(r"\(engram\.(\w+)\)", (ROOT / "pyproject.toml").read_text()))


def lint(folder: Path, working_folder: Path) -> subprocess.CompletedProcess[str]:
    """Hold the package `engram` in `folder` to the repository's contracts."""
    return subprocess.run(
        [sys.executable, "-c", LINT, str(ROOT / "pyproject.toml")],
        cwd=working_folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


def sample(folder: Path, modules: dict[str, str]) -> Path:
    """Write a package `engram` with every room, and a module with the source given for a room."""
    for name in ["", *sorted(SAMPLE_ROOMS)]:
        room = folder / "engram" / name
        room.mkdir()
        (room / "__init__.py").touch()
    for room, source in modules.items():
        (folder / "engram" / room / "module.py").write_text(source + "\n")
    return folder


def rooms_without_docstring(package: Path, files: list[Path]) -> list[str]:
    """Return the folders of `package` that hold modules but no `__init__.py` that says what for."""
    folders = {path.parent for path in files if path.suffix == ".py" and package in path.parents}
    silent = []
    for folder in sorted(folders):
        init = folder / "__init__.py"
        if not init.exists() or not ast.get_docstring(ast.parse(init.read_text())):
            silent.append(str(folder.relative_to(package.parent)))
    return silent


def test_every_room_says_what_it_is() -> None:
    files = repository_files()
    assert PACKAGE / "sglang_plugin" / "__init__.py" in files
    assert rooms_without_docstring(PACKAGE, files) == []


def test_a_silent_room_is_seen(tmp_path: Path) -> None:
    package = sample(tmp_path, {"store": "x = 1"}) / "engram"
    (package / "errors" / "__init__.py").write_text('"""Says what it is."""\n')
    (package / "cli" / "__init__.py").unlink()
    (package / "cli" / "main.py").touch()
    files = [path for path in package.rglob("*") if path.is_file()]
    silent = rooms_without_docstring(package, files)
    assert {"engram", "engram/store", "engram/cli"} <= set(silent)
    assert "engram/errors" not in silent


def test_the_contracts_hold(tmp_path: Path) -> None:
    result = lint(PACKAGE.parent, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Contracts: 3 kept, 0 broken." in result.stdout


@pytest.mark.parametrize(
    ("contract", "room", "source"),
    [
        (ROOMS, "store", "from engram.service import module"),
        (ROOMS, "store", "import engram.catalog"),
        (ROOMS, "core", "def f():\n    import engram.snapshot"),
        (ROOMS, "core", "import engram.version"),
        (ROOMS, "tiers", "import engram.retention"),
        (ROOMS, "client", "import engram.store"),
        (ROOMS, "server", "import engram.sglang_plugin"),
        (ROOMS, "sglang_plugin", "import engram.testing"),
        (ROOMS, "testing", "import engram.sglang_plugin"),
        (SEAM, "server", "import sglang"),
        (SEAM, "cli", "from sglang.srt.server_args import ServerArgs"),
        (SEAM, "testing", "def f():\n    import sglang.srt"),
        (
            SEAM,
            "tiers",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sglang",
        ),
        (LIGHT, "core", "import torch"),
        (LIGHT, "client", "from torch import nn"),
    ],
)
def test_a_forbidden_import_is_seen(tmp_path: Path, contract: str, room: str, source: str) -> None:
    result = lint(sample(tmp_path, {room: source}), tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"{contract} BROKEN" in result.stdout
    assert f"engram.{room}.module -> " in result.stdout


def test_torch_is_seen_behind_another_room(tmp_path: Path) -> None:
    modules = {"core": "import engram.errors.module", "errors": "import torch"}
    result = lint(sample(tmp_path, modules), tmp_path)
    assert f"{LIGHT} BROKEN" in result.stdout


def test_what_the_rooms_are_for_is_allowed(tmp_path: Path) -> None:
    modules = {
        "cli": "import engram.sglang_plugin, engram.client, engram.testing, engram.service",
        "sglang_plugin": "import sglang.srt, torch, engram.server, engram.agents, engram.tiers",
        "server": "import engram.service, engram.agents",
        "service": "import engram.tiers, engram.retention, engram.conversation, engram.catalog",
        "tiers": "import engram.store, engram.snapshot, torch",
        "conditional_memory": "import torch, engram.store, engram.core",
        "client": "import engram.core, engram.errors, engram.version",
        "core": "import engram.errors, msgspec",
    }
    result = lint(sample(tmp_path, modules), tmp_path)
    assert "Contracts: 3 kept, 0 broken." in result.stdout, result.stdout + result.stderr


def test_rooms_need_not_exist(tmp_path: Path) -> None:
    (tmp_path / "engram").mkdir()
    (tmp_path / "engram" / "__init__.py").touch()
    result = lint(tmp_path, tmp_path)
    assert "Contracts: 3 kept, 0 broken." in result.stdout, result.stdout + result.stderr
