"""Keys: their spelling, their files, and that nothing shows them."""

import copy
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from engram.errors import EncryptionKeyError, StoreError
from engram.store.keys import (
    KEY_VARIABLE,
    find_key,
    new_key,
    parse_key,
    publish_in_memory,
    read_key_file,
    write_key_file,
)

KEY = new_key()
SECRET = KEY.text().strip().removeprefix("engram-key-1:")


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    write_key_file(path, KEY)
    return path


def test_a_key_file_comes_back(key_file: Path) -> None:
    assert key_file.read_text() == f"engram-key-1:{SECRET}\n"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert read_key_file(key_file) == KEY
    key_file.write_text(f"engram-key-1:{SECRET}")  # without the line feed
    assert read_key_file(key_file) == KEY
    assert new_key() != KEY


def test_a_key_file_is_never_replaced(key_file: Path) -> None:
    with pytest.raises(EncryptionKeyError, match="exists"):
        write_key_file(key_file, new_key())
    assert read_key_file(key_file) == KEY
    with pytest.raises(StoreError, match="cannot make"):
        write_key_file(key_file.parent / "missing" / "key", KEY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        SECRET,
        f"engram-key-1:{SECRET[:-1]}",
        f"engram-key-1:{SECRET}0",
        f"engram-key-1:{SECRET.upper()[:-1]}F",
        f"engram-key-2:{SECRET}",
        f" engram-key-1:{SECRET}",
        f"engram-key-1:{SECRET}\n\n",
        f"engram-key-1:{SECRET}\r\n",
        f"engram-key-1:{SECRET[:-1]}\u0663",
        "x" * 100_000,
    ],
    ids=lambda text: f"{len(text)} characters",
)
def test_only_one_spelling_is_a_key_and_none_is_repeated(key_file: Path, text: str) -> None:
    key_file.write_text(text)
    with pytest.raises(EncryptionKeyError, match="holds no key") as caught:
        read_key_file(key_file)
    assert SECRET[:20] not in str(caught.value).lower()
    assert str(key_file) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o601, 0o660])
def test_a_file_open_to_others_is_refused(key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    with pytest.raises(EncryptionKeyError, match=f"its mode is {mode:04o}") as caught:
        read_key_file(key_file)
    assert "chmod 600" in caught.value.hint


def test_a_file_of_another_user_is_refused(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = key_file.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    if owner == 0:
        assert read_key_file(key_file) == KEY  # root's: it could read it anyway
        os.chown(key_file, 12345, -1)
    with pytest.raises(EncryptionKeyError, match="another user"):
        read_key_file(key_file)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing"):
        with pytest.raises(EncryptionKeyError):
            read_key_file(path)


def test_the_environment(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert find_key(None) is None
    assert find_key(key_file) == KEY
    other = new_key()
    monkeypatch.setenv(KEY_VARIABLE, other.text().strip())
    assert find_key(None) == other
    with pytest.raises(EncryptionKeyError, match="one of the two"):
        find_key(key_file)
    for text in ("", "engram-key-1:", SECRET):
        monkeypatch.setenv(KEY_VARIABLE, text)
        with pytest.raises(EncryptionKeyError, match=KEY_VARIABLE) as caught:
            find_key(None)
        assert SECRET not in str(caught.value)


def test_nothing_shows_a_key() -> None:
    for shown in (repr(KEY), str(KEY), f"{KEY}", repr([KEY]), repr({"key": KEY})):
        assert SECRET not in shown
        assert KEY.fingerprint in shown
    assert KEY.fingerprint not in SECRET
    assert not hasattr(KEY, "__dict__")
    for carry in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled"):
            carry(KEY)


def test_another_process_finds_a_key_that_is_in_memory_only() -> None:
    path = publish_in_memory(KEY)
    assert SECRET not in path
    program = (
        "import sys; from engram.store.keys import read_key_file;"
        "print(read_key_file(sys.argv[1]).fingerprint)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=False
    )
    assert result.stdout.strip() == KEY.fingerprint, result.stderr
    assert parse_key(Path(path).read_text(), "there") == KEY
    os.close(int(Path(path).name))
    with pytest.raises(EncryptionKeyError, match="cannot be read"):
        read_key_file(path)
