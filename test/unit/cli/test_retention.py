"""`engram retention --dry-run` shows a plan and leaves the store as it is."""

import json
import tracemalloc
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from engram.cli.main import app
from engram.store import marker
from engram.store.disk import DiskStore
from engram.store.keys import new_key
from engram.testing.samples import sample_manifest, sample_turns, seeded_random
from unit.cli.test_store_health import contents, damage_manifest

YEAR = "31536000000"  # a thousand of them: nothing of the samples is cold


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three turns of one conversation, each on the one before."""
    chains = sample_turns(seeded_random(), (5, 3, 4))
    root = tmp_path / "store"
    with DiskStore.open(root) as store:
        for turn, chain in enumerate(chains, 1):
            for segment in chain:
                store.put_segment(segment.header, memoryview(segment.payload), segment.segment_id)
            store.put_manifest(
                sample_manifest(
                    [chain], snapshot_id=f"snap-{turn}", turn_number=turn, pinned=turn == 1
                )
            )
    return root


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["retention", *arguments])


def test_the_json_of_a_plan(store: Path) -> None:
    before = contents(store)
    result = run(
        *("--dir", str(store), "--dry-run", "--json", "--conversation-cold-retention", YEAR),
        *("--snapshot-retention-count", "1"),
    )
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert contents(store) == before
    size = sum(path.stat().st_size for path in store.rglob("*.seg"))
    with DiskStore.open(store) as opened:
        state = opened.get_manifest("snap-2").segments[0][-1]
    assert report == {
        "remove": [
            {
                "tenant": "",
                "conversation_id": "conversation-1",
                "branch_name": "main",
                "turn_number": 2,
                "snapshot_id": "snap-2",
                "reason": "count",
                "text": "not among the newest 1 of branch 'main'",
                "freed_bytes": state.bytes,
            }
        ],
        "keep": {"pinned": 1, "within the policy": 1},
        "bytes_before": size,
        "bytes_after": size - state.bytes,
        "over_quota": 0,
        "unreadable": [],
    }


def test_what_a_person_reads(store: Path) -> None:
    quota = ["--snapshot-disk-quota-gb", "0.000000001", "--conversation-cold-retention", YEAR]
    result = run("--dir", str(store), "--dry-run", *quota)
    assert result.exit_code == 0
    assert "2 snapshots would go, 1 stay" in result.output
    assert "1 stay: pinned" in result.output
    assert "over the quota stay" in result.output
    assert "least valuable while" in result.output


def test_the_servers_defaults_are_used(store: Path) -> None:
    report = json.loads(run("--dir", str(store), "--dry-run", "--json").stdout)
    # The samples are years old, and a week is how long a conversation stays.
    assert [(r["snapshot_id"], r["reason"]) for r in report["remove"]] == [
        ("snap-2", "cold"),
        ("snap-3", "cold"),
    ]


def test_a_damaged_manifest_is_told_and_left(store: Path) -> None:
    damage_manifest(store)
    before = contents(store)
    result = run("--dir", str(store), "--dry-run", "--conversation-cold-retention", YEAR)
    assert result.exit_code == 0
    assert "cannot be read; not planned" in result.output
    assert "2 stay" in result.output
    assert contents(store) == before


def test_an_encrypted_store_is_planned_without_its_key(tmp_path: Path) -> None:
    """Manifests are not encrypted."""
    with DiskStore.open(tmp_path / "store", key=new_key()) as store:
        for turn, chain in enumerate(sample_turns(seeded_random(), (5, 3)), 1):
            for segment in chain:
                store.put_segment(segment.header, memoryview(segment.payload), segment.segment_id)
            store.put_manifest(
                sample_manifest([chain], snapshot_id=f"snap-{turn}", turn_number=turn)
            )
    result = run("--dir", str(tmp_path / "store"), "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["remove"]) == 2


def test_no_manifest_stays_in_memory(tmp_path: Path) -> None:
    """Each has a lot of metadata: what is planned over has none of it."""
    (chain,) = sample_turns(seeded_random(), (5,))
    count, size = 60, 60_000
    with DiskStore.open(tmp_path / "store") as store:
        for segment in chain:
            store.put_segment(segment.header, memoryview(segment.payload), segment.segment_id)
        for turn in range(count):
            manifest = sample_manifest(
                [chain],
                snapshot_id=f"snap-{turn}",
                turn_number=turn,
                user_metadata={"note": "x" * size},
            )
            store.put_manifest(manifest)
    run("--dir", str(tmp_path / "store"), "--dry-run")  # what the first run imports
    tracemalloc.start()
    result = run("--dir", str(tmp_path / "store"), "--dry-run", "--json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.exit_code == 0
    assert peak < count * size // 3


def test_a_newer_store_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marker, "FORMAT", 0)
    before = contents(store)
    result = run("--dir", str(store), "--dry-run")
    assert result.exit_code == 2
    assert "newer" in result.output
    assert contents(store) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "only --dry-run exists: this command removes nothing"),
        (["--dry-run", "--snapshot-retention-count", "0"], "--snapshot-retention-count: Input"),
        (["--dry-run", "--snapshot-disk-quota-gb", "-1"], "--snapshot-disk-quota-gb: Input"),
    ],
)
def test_what_cannot_be_done_is_said(store: Path, arguments: list[str], message: str) -> None:
    before = contents(store)
    result = run("--dir", str(store), *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert contents(store) == before


def test_a_folder_that_is_no_store_is_told(tmp_path: Path) -> None:
    result = run("--dir", str(tmp_path), "--dry-run")
    assert result.exit_code == 2
    assert "is no snapshot store" in result.output
    assert list(tmp_path.iterdir()) == []
