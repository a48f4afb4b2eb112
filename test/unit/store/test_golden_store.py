"""A store that the first release of format 1 wrote is read, checked and served for ever."""

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from engram.catalog.catalog import Catalog
from engram.errors import StoreFormatError
from engram.snapshot.conversation import ConversationRecord
from engram.snapshot.envelope import seal_record
from engram.snapshot.manifest import Manifest, rows_of
from engram.snapshot.segment import SegmentHeader, Shard
from engram.store.disk import DiskStore
from engram.store.layout import Layout
from engram.store.reading import open_for_reading
from engram.upkeep.check import StoreChecker
from unit.upkeep.stores import contents

DATA = Path(__file__).parents[2] / "data" / "store-v1"
EXPECTED: dict[str, dict[str, Any]] = json.loads((DATA / "expected.json").read_text())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "store", tmp_path / "store"))


def buffers_of(store: DiskStore, manifest: Manifest) -> dict[str, bytes]:
    """The bytes of each buffer along a chain, the tokens among them."""
    found: dict[str, bytes] = {}
    for ref in manifest.segments[0]:
        payloads: list[memoryview] = []

        def into(header: SegmentHeader, payloads: list[memoryview] = payloads) -> memoryview:
            payloads.append(memoryview(bytearray(header.payload_length)))
            return payloads[0]

        header = store.read_segment(Shard(manifest.namespace, 0, 1), ref.segment_id, into)
        for spec in header.buffers:
            data = bytes(header.view(payloads[0], spec.name))
            if not ref.has_state:
                data = data[: len(data) // (header.end - header.start) * (ref.end - ref.start)]
            found[spec.name] = found.get(spec.name, b"") + data
    return found


def test_it_is_whole_and_looking_changes_nothing(root: Path) -> None:
    before = contents(root)
    check = StoreChecker(open_for_reading(root), repair=False, marker="intact").run()
    assert check.problems == []
    assert (check.manifests, check.segments) == (len(EXPECTED), 10)
    assert contents(root) == before


def test_every_snapshot_is_what_was_put_in(root: Path) -> None:
    with DiskStore.open(root) as store, closing(Catalog.open(store.catalog_path, store)) as catalog:
        assert catalog.report.damaged == []
        rows = catalog.all_snapshots()
        assert {f"{row.tenant}/{row.snapshot_id}" for row in rows} == set(EXPECTED)
        for row in rows:
            expected = EXPECTED[f"{row.tenant}/{row.snapshot_id}"]
            manifest = store.get_manifest(row.snapshot_id, row.tenant)
            fields = manifest.model_dump(mode="json")
            assert {name: fields[name] for name in expected["fields"]} == expected["fields"]
            found = buffers_of(store, manifest)
            tokens = memoryview(found.pop("tokens")).cast("I").tolist()
            assert [*tokens, *manifest.pending_tokens] == expected["tokens"]
            assert {name: data.hex() for name, data in found.items()} == expected["bytes"]
            chain = catalog.chain(row.namespace, 0, row.boundary_key)
            assert chain[-1].key == expected["boundary_key"]
        record = ConversationRecord(tenant="", conversation_id="talk", priority=80)
        assert list(store.iter_conversations()) == [record]


def test_it_has_rows_that_are_used_in_part() -> None:
    store = open_for_reading(DATA / "store")
    parts = [
        ref
        for manifest in store.iter_manifests()
        if isinstance(manifest, Manifest)
        for ref in rows_of(manifest.segments[0])
        if store.verify_segment(Shard(manifest.namespace, 0, 1), ref.segment_id).end > ref.end
    ]
    assert len(parts) == 1


def test_a_newer_format_is_refused_by_name(root: Path) -> None:
    marker = Layout(root).marker
    body = json.loads(marker.read_bytes())["body"]
    marker.write_bytes(seal_record({**body, "format": body["format"] + 1}))
    before = contents(root)
    with pytest.raises(StoreFormatError, match="has format version 2"):
        DiskStore.open(root)
    after = {name: digest for name, digest in contents(root).items() if name != "lock"}
    assert after == {name: digest for name, digest in before.items() if name != "lock"}
