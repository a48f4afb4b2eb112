"""`engram key` makes keys and puts a store under another one; it never prints a key."""

import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from engram.cli.keys import key_of
from engram.cli.main import app
from engram.errors import EncryptionKeyError
from engram.store.disk import DiskStore
from engram.store.keys import KEY_VARIABLE, read_key_file
from engram.testing.contracts import put, read
from engram.testing.samples import sample_segment, seeded_random


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["key", *arguments])


def make(path: Path) -> Path:
    result = run("new", str(path))
    assert result.exit_code == 0, result.output
    key = read_key_file(path)
    assert key.fingerprint in result.output
    assert key.text().split(":")[1].strip() not in result.output
    return path


def test_a_new_key(tmp_path: Path) -> None:
    path = make(tmp_path / "key")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_text()
    result = run("new", str(path))
    assert result.exit_code == 2
    assert "exists" in result.output
    assert path.read_text() == before
    assert read_key_file(make(tmp_path / "another")) != read_key_file(path)
    assert run("show", str(path)).output == read_key_file(path).fingerprint + "\n"
    path.chmod(0o644)
    open_to_others = run("show", str(path))
    assert open_to_others.exit_code == 2
    assert "chmod 600" in open_to_others.output


def test_rotation(tmp_path: Path) -> None:
    old, new = make(tmp_path / "old"), make(tmp_path / "new")
    root, segment = tmp_path / "store", sample_segment(seeded_random())
    with DiskStore.open(root, key=read_key_file(old)) as store:
        put(store, segment)
        rotate = ["rotate", "--dir", str(root), "--old", str(old), "--new", str(new)]
        busy = run(*rotate)
        assert busy.exit_code == 2
        assert "another server uses" in busy.output
    result = run(*rotate)
    assert result.exit_code == 0, result.output
    assert read_key_file(new).fingerprint in result.output
    with pytest.raises(EncryptionKeyError, match="does not open"):
        DiskStore.open(root, key=read_key_file(old))
    with DiskStore.open(root, key=read_key_file(new)) as store:
        assert read(store, segment)[1] == segment.payload
    wrong = run("rotate", "--dir", str(root), "--old", str(old), "--new", str(make(tmp_path / "3")))
    assert wrong.exit_code == 2
    assert "does not open this store" in wrong.output
    for text in (busy.output, result.output, wrong.output):
        for path in (old, new):
            assert path.read_text().split(":")[1].strip() not in text


def test_the_key_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    path = make(tmp_path / "key")
    assert key_of(None) is None
    assert key_of(path) == read_key_file(path)
    monkeypatch.setenv(KEY_VARIABLE, path.read_text())
    assert key_of(None) == read_key_file(path)
