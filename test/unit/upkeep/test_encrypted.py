"""The store's tools on an encrypted store: with its key as ever, without it refused at once."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from engram.cli.main import app
from engram.store.disk import DiskStore
from engram.store.encryption import is_encrypted
from engram.store.keys import KEY_VARIABLE, new_key, read_key_file, write_key_file
from engram.testing.samples import sample_chain, seeded_random
from engram.testing.tamper import flip_bit, read_payload
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


def segment_files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.seg"))


def test_fsck_finds_and_quarantines_damage_under_encryption(root: Path, key_file: Path) -> None:
    damaged = seeded_random().choice(segment_files(root))
    flip_bit(damaged)
    looked = run("fsck", "--dir", root, "--key-file", key_file, "--json")
    assert looked.exit_code == 1
    (problem,) = json.loads(looked.stdout)["problems"]
    assert problem["kind"] == "segment"
    assert problem["file"] == str(damaged)
    assert problem["snapshots"]
    assert damaged.exists()
    mended = run("fsck", "--dir", root, "--repair", "--key-file", key_file, "--json")
    assert mended.exit_code == 1
    (moved,) = json.loads(mended.stdout)["problems"]
    assert not damaged.exists()
    # As it was, still encrypted: a backup of the file can be compared with it.
    assert is_encrypted(Path(moved["quarantined_to"]).read_bytes())
    refused = run(
        *("export", "--dir", root, "--conversation", "talk", "-o", root.parent / "file"),
        *("--key-file", key_file),
    )
    assert refused.exit_code == 2
    assert damaged.stem in refused.output
    assert not (root.parent / "file").exists()


def test_gc_removes_orphans_of_an_encrypted_store_and_nothing_else(
    root: Path, key_file: Path
) -> None:
    before = set(segment_files(root))
    with DiskStore.open(root, key=read_key_file(key_file)) as store:
        (orphan,) = sample_chain(seeded_random(), (9,))[:1]
        store.put_segment(orphan.header, memoryview(orphan.payload), orphan.segment_id)
    (added,) = set(segment_files(root)) - before
    young = run("gc", "--dir", root, "--key-file", key_file, "--json")
    assert json.loads(young.stdout)["segments"] == 0
    done = run("gc", "--dir", root, "--grace", "0", "--key-file", key_file, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["segments"], report["named"]) == (1, len(before))
    assert not added.exists()
    assert set(segment_files(root)) == before
    assert run("fsck", "--dir", root, "--key-file", key_file).exit_code == 0


def test_after_a_rotation_every_tool_takes_the_new_key_and_none_the_old(
    root: Path, key_file: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "before"
    export = ("export", "--dir", root, "--conversation", "talk", "-o")
    assert run(*export, archive, "--key-file", key_file).exit_code == 0
    segments = {path: path.read_bytes() for path in segment_files(root)}
    new = tmp_path / "new.key"
    assert run("key", "new", new).exit_code == 0
    rotated = run("key", "rotate", "--dir", root, "--old", key_file, "--new", new)
    assert rotated.exit_code == 0, rotated.output
    assert {path: path.read_bytes() for path in segment_files(root)} == segments
    before = contents(root)
    for command in commands(root, tmp_path):
        refused = run(*command, "--key-file", key_file)
        assert refused.exit_code == 2, (command, refused.output)
        assert "key" in refused.output
    assert contents(root) == before
    for command in commands(root, tmp_path):
        taken = run(*command, "--key-file", new)
        assert taken.exit_code == 0, (command, taken.output)
    # The same archive, to the byte: what is in it does not depend on the key.
    assert (tmp_path / "archive").read_bytes() == archive.read_bytes()
    # What is written from now on lies under another data key, and is read beside the old.
    copy = run("import", archive, "--dir", root, "--as-snapshot", "x", "--key-file", new)
    assert copy.exit_code == 2
    elsewhere = run("import", archive, "--dir", root, "--as", "copy", "--key-file", new, "--json")
    assert elsewhere.exit_code == 0, elsewhere.output
    assert json.loads(elsewhere.stdout)["new_segments"] == 0
    assert run("fsck", "--dir", root, "--key-file", new).exit_code == 0


def test_an_archive_moves_a_conversation_from_one_key_to_another(
    root: Path, key_file: Path, tmp_path: Path
) -> None:
    """Out of one encrypted store and into another: the payloads are the same, the files are not."""
    archive, other = tmp_path / "archive", tmp_path / "other.key"
    write_key_file(other, new_key())
    with DiskStore.open(tmp_path / "new", key=read_key_file(other)):
        pass
    export = ("export", "--dir", root, "--conversation", "talk", "-o", archive)
    assert run(*export, "--key-file", key_file).exit_code == 0
    before = contents(tmp_path / "new")
    for options in ((), ("--key-file", key_file)):
        refused = run("import", archive, "--dir", tmp_path / "new", *options)
        assert refused.exit_code == 2, refused.output
        assert "key" in refused.output
    assert contents(tmp_path / "new") == before
    done = run("import", archive, "--dir", tmp_path / "new", "--key-file", other)
    assert done.exit_code == 0, done.output
    names = {path.name for path in segment_files(root)}
    arrived = segment_files(tmp_path / "new")
    with (
        DiskStore.open(root, key=read_key_file(key_file)) as old,
        DiskStore.open(tmp_path / "new", key=read_key_file(other)) as new,
    ):
        assert {path.name for path in arrived} <= names
        assert arrived
        for segment in new.iter_segments():
            assert is_encrypted(new._layout.segment(segment.shard, segment.segment_id).read_bytes())
            here = read_payload(new, segment.shard, segment.segment_id)
            assert here == read_payload(old, segment.shard, segment.segment_id)


def test_a_flipped_bit_anywhere_in_an_encrypted_segment_ends_an_export(
    root: Path, key_file: Path, tmp_path: Path
) -> None:
    rng = seeded_random()
    with DiskStore.open(root, key=read_key_file(key_file)) as store:
        named = {ref.segment_id for ref in store.get_manifest("talk-main-3").segments[0]}
    path = rng.choice([path for path in segment_files(root) if path.stem in named])
    whole = path.read_bytes()
    for place in sorted(rng.sample(range(len(whole)), 20)):
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        result = run(
            *("export", "--dir", root, "talk-main-3", "-o", tmp_path / "file"),
            *("--key-file", key_file),
        )
        assert result.exit_code == 2, (place, result.output)
        assert not (tmp_path / "file").exists()
    path.write_bytes(whole)
    again = run(
        *("export", "--dir", root, "talk-main-3", "-o", tmp_path / "file", "--key-file", key_file)
    )
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("command", [("gc", "--grace", "0"), ("fsck", "--repair")])
def test_a_key_that_lies_about_encrypts_no_store_in_the_clear(
    tmp_path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """It may be meant for another store, and there is no way back."""
    root = tmp_path / "clear"
    with DiskStore.open(root) as store:
        add_conversation(store, seeded_random())
    monkeypatch.setenv(KEY_VARIABLE, key_file.read_text())
    result = run(*command, "--dir", root)
    assert result.exit_code == 0, result.output
    DiskStore.open(root).close()
