"""The store's tools on an encrypted store: with its key as ever, without it refused at once."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from engram.cli.main import app
from engram.store.disk import DiskStore
from engram.store.keys import KEY_VARIABLE, new_key, read_key_file, write_key_file
from engram.testing.samples import seeded_random
from unit.upkeep.stores import add_conversation, contents


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "the.key"
    write_key_file(path, new_key())
    return path


@pytest.fixture
def root(tmp_path: Path, key_file: Path) -> Path:
    with DiskStore.open(tmp_path / "store", key=read_key_file(key_file)) as store:
        add_conversation(store, seeded_random())
    return tmp_path / "store"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def commands(root: Path, tmp_path: Path) -> list[tuple[object, ...]]:
    return [
        ("fsck", "--dir", root),
        ("gc", "--dir", root, "--dry-run"),
        ("gc", "--dir", root, "--grace", "0"),
        ("export", "--dir", root, "--conversation", "talk", "-o", tmp_path / "archive"),
        ("fsck", "--dir", root, "--repair"),
    ]


def test_with_its_key_everything_is_whole(root: Path, key_file: Path, tmp_path: Path) -> None:
    for command in commands(root, tmp_path):
        result = run(*command, "--key-file", key_file)
        assert result.exit_code == 0, (command, result.output)
    found = json.loads(run("fsck", "--dir", root, "--key-file", key_file, "--json").stdout)
    assert found["healthy"]
    assert found["segments"] > 0
    elsewhere = tmp_path / "elsewhere"
    result = run("import", tmp_path / "archive", "--dir", elsewhere, "--create")
    assert result.exit_code == 0, result.output
    result = run("import", tmp_path / "archive", "--dir", root, "--as", "x", "--key-file", key_file)
    assert result.exit_code == 0, result.output


def test_without_its_key_nothing_is_called_damaged(root: Path, tmp_path: Path) -> None:
    before = contents(root)
    wrong = tmp_path / "wrong.key"
    write_key_file(wrong, new_key())
    for command in commands(root, tmp_path):
        for options in ((), ("--key-file", wrong)):
            result = run(*command, *options)
            assert result.exit_code == 2, (command, result.output)
            assert "key" in result.output
    assert contents(root) == before
    assert not (tmp_path / "archive").exists()


def test_the_key_may_come_from_the_environment(
    root: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key_file.read_text().strip())
    assert run("fsck", "--dir", root).exit_code == 0
