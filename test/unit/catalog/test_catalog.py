"""The catalog's queries, against what was put in."""

import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from engram.catalog.catalog import Catalog
from engram.catalog.database import Database
from engram.catalog.rows import BranchRow, UnreferencedSegment
from engram.errors import (
    AlreadyExistsError,
    InvalidRequestError,
    NotFoundError,
    StoreError,
    StoreFullError,
)
from engram.snapshot.listing import ManifestEntry, manifest_name
from engram.snapshot.manifest import Manifest, change_manifest
from engram.snapshot.segment import Shard
from engram.store.disk import DiskStore
from engram.testing.samples import (
    SHARD,
    SampleSegment,
    sample_chain,
    sample_manifest,
    sample_segment,
    sample_state,
    sample_turns,
    seeded_random,
)


@pytest.fixture
def rng() -> Random:
    return seeded_random()


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with DiskStore.open(tmp_path / "store") as store:
        catalog = Catalog.open(store.catalog_path, store)
        yield catalog
        catalog.close()


def insert(catalog: Catalog, manifest: Manifest) -> Manifest:
    name = manifest_name(manifest.snapshot_id, manifest.tenant)
    catalog.insert(manifest, ManifestEntry(name, "stamp"))
    return manifest


def insert_and_fail(catalog: Catalog, *manifests: Manifest) -> None:
    with catalog.atomic():
        for manifest in manifests:
            insert(catalog, manifest)
        raise RuntimeError


def turns(rng: Random, count: int, **fields: object) -> list[Manifest]:
    """One conversation: each turn's snapshot stands on the segments of all turns before."""
    return [
        sample_manifest(
            [chain],
            **{
                "snapshot_id": f"{fields.get('conversation_id', 'c')}-{turn}",
                "conversation_id": "c",
                "turn_number": turn,
                "created_at": 1000.0 + turn,
                **fields,
            },
        )
        for turn, chain in enumerate(sample_turns(rng, [2] * count), 1)
    ]


def ids(page: object) -> list[str]:
    return [row.snapshot_id for row in page.snapshots]  # type: ignore[attr-defined]


class TestSnapshots:
    def test_a_row_shows_what_the_manifest_says(self, catalog: Catalog, rng: Random) -> None:
        manifest = insert(
            catalog,
            sample_manifest(
                [sample_chain(rng)],
                tenant="team",
                parent_snapshot="before",
                health="norm drift",
                user_metadata={"a": [1, {"b": None}], "é": "\u0000"},
                pinned=True,
                expires_at=5.5,
                rid="request-1",
                durability="async",
                pending_tokens=[1, 2],
            ),
        )
        row = catalog.get("snap-1", "team")
        for field in (
            "snapshot_id",
            "tenant",
            "conversation_id",
            "branch_name",
            "turn_number",
            "parent_snapshot",
            "created_at",
            "namespace",
            "model_name",
            "token_count",
            "durability",
            "world_size",
            "boundary_key",
            "bytes",
            "unique_bytes",
            "health",
            "user_metadata",
            "pinned",
            "expires_at",
            "rid",
        ):
            assert getattr(row, field) == getattr(manifest, field), field
        assert (row.num_layers, row.model_type) == (3, "hybrid")
        assert row.pending_count == 2
        assert row.pinned is True

    def test_find_by_turn_and_the_newest(self, catalog: Catalog, rng: Random) -> None:
        for manifest in reversed(turns(rng, 12)):
            insert(catalog, manifest)
        assert catalog.find("", "c", "main", 3).snapshot_id == "c-3"
        assert catalog.find("", "c", "main").snapshot_id == "c-12"

    @pytest.mark.parametrize(
        ("place", "problem"),
        [
            (("", "d", "main", None), "no conversation 'd'"),
            (("them", "c", "main", None), "no conversation 'c'"),
            (("", "c", "side", None), "has no branch 'side'"),
            (("", "c", "main", 9), "has no turn 9"),
        ],
    )
    def test_what_is_unknown_is_named(
        self, catalog: Catalog, rng: Random, place: tuple, problem: str
    ) -> None:
        insert(catalog, turns(rng, 1)[0])
        with pytest.raises(NotFoundError, match=problem):
            catalog.find(*place)

    def test_snapshots_of_a_namespace_are_those_it_can_restore(
        self, catalog: Catalog, rng: Random
    ) -> None:
        manifests = [insert(catalog, manifest) for manifest in turns(rng, 2)]
        found = catalog.boundary_keys(SHARD.namespace)
        assert found == {("", m.snapshot_id): [m.boundary_key] for m in manifests}
        assert catalog.boundary_keys("00" * 32) == {}

    def test_without_states_wherever_rows_end_can_be_gone_on_from(
        self, catalog: Catalog, rng: Random
    ) -> None:
        chain = sample_chain(rng, (2, 3, 4))[:-1]
        insert(catalog, sample_manifest([chain]))
        keys = [segment.header.key for segment in chain]
        assert catalog.boundary_keys(SHARD.namespace) == {("", "snap-1"): keys}
        assert catalog.boundary_keys_of("snap-1") == keys
        assert catalog.boundary_keys_of("unknown") == []
        for length, key in enumerate(keys, 1):
            refs = [segment.ref for segment in chain[:length]]
            assert catalog.chain(SHARD.namespace, 0, key) == refs

    def test_a_boundary_of_one_rank_alone_is_none_of_all(
        self, catalog: Catalog, rng: Random
    ) -> None:
        cut, uncut = (sample_chain(rng, lengths)[:-1] for lengths in ((2, 3), (5,)))
        end = replace(
            uncut[-1], header=uncut[-1].header.model_copy(update={"key": cut[-1].header.key})
        )
        insert(catalog, sample_manifest([cut, [end]]))
        first, last = (segment.header.key for segment in cut)
        found = catalog.chains(SHARD.namespace, 2, last)
        assert found == [[segment.ref for segment in cut], [end.ref]]
        with pytest.raises(NotFoundError):
            catalog.chains(SHARD.namespace, 2, first)

    def test_a_snapshot_id_is_given_once(self, catalog: Catalog, rng: Random) -> None:
        manifest = insert(catalog, turns(rng, 1)[0])
        again = change_manifest(manifest, conversation_id="elsewhere")
        for attempt in (lambda: catalog.ensure_free(again), lambda: insert(catalog, again)):
            with pytest.raises(AlreadyExistsError, match="'c-1' exists already"):
                attempt()
        assert len(catalog.all_snapshots()) == 1

    def test_a_turn_is_given_once(self, catalog: Catalog, rng: Random) -> None:
        manifest = insert(catalog, turns(rng, 1)[0])
        again = change_manifest(manifest, snapshot_id="other")
        for attempt in (lambda: catalog.ensure_free(again), lambda: insert(catalog, again)):
            with pytest.raises(AlreadyExistsError, match="turn 1 of branch 'main'") as caught:
                attempt()
            assert caught.value.details == {"snapshot_id": "c-1"}
        insert(catalog, change_manifest(again, branch_name="side"))
        insert(catalog, change_manifest(again, tenant="them", snapshot_id="c-1"))

    def test_tenants_do_not_see_each_other(self, catalog: Catalog, rng: Random) -> None:
        ours = insert(catalog, turns(rng, 1)[0])
        insert(catalog, turns(rng, 1, tenant="them", branch_name="theirs")[0])
        assert catalog.get("c-1").branch_name == "main"
        assert catalog.get("c-1", "them").branch_name == "theirs"
        assert [row.branch_name for row in catalog.list_snapshots("").snapshots] == ["main"]
        assert [row.branch_name for row in catalog.branches("them", "c")] == ["theirs"]
        assert [row.snapshots for row in catalog.conversations("")] == [1]
        assert catalog.delete(ours.snapshot_id)
        assert catalog.get("c-1", "them").tenant == "them"
        with pytest.raises(NotFoundError, match="no snapshot 'c-1'"):
            catalog.get("c-1")
        assert [row.tenant for row in catalog.all_snapshots()] == ["them"]

    def test_a_replacement_changes_the_row_and_keeps_the_segments(
        self, catalog: Catalog, rng: Random
    ) -> None:
        manifest = insert(catalog, turns(rng, 2)[1])
        before = catalog.chain(SHARD.namespace, 0, manifest.boundary_key)
        catalog.replace(
            change_manifest(manifest, pinned=True, user_metadata={"a": 1}),
            ManifestEntry(manifest_name("c-2", ""), "new stamp"),
        )
        assert catalog.get("c-2").pinned
        assert catalog.get("c-2").user_metadata == {"a": 1}
        assert catalog.chain(SHARD.namespace, 0, manifest.boundary_key) == before
        assert catalog.unreferenced_segments() == []
        with pytest.raises(NotFoundError):
            catalog.replace(change_manifest(manifest, snapshot_id="x"), ManifestEntry("x", "y"))
        assert len(catalog.all_snapshots()) == 1


class TestListing:
    @pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
    def test_pages_join_to_the_whole(self, catalog: Catalog, rng: Random, limit: int) -> None:
        # Pairs of one age, so that the id has to decide.
        manifests = [
            sample_manifest(
                [sample_chain(rng, (2,))],
                snapshot_id=f"s{number:02}",
                turn_number=number,
                created_at=1000.1 + number // 2,
            )
            for number in range(7)
        ]
        for manifest in rng.sample(manifests, len(manifests)):
            insert(catalog, manifest)
        found: list[str] = []
        after = None
        for _ in range(8):
            page = catalog.list_snapshots("", limit=limit, after=after)
            assert len(page.snapshots) <= limit
            found += ids(page)
            after = page.after
            if after is None:
                break
        assert found == [manifest.snapshot_id for manifest in manifests]

    def test_a_cursor_outlives_the_snapshot_it_came_from(
        self, catalog: Catalog, rng: Random
    ) -> None:
        for manifest in turns(rng, 4):
            insert(catalog, manifest)
        page = catalog.list_snapshots("", limit=2)
        catalog.delete("c-2")
        assert ids(catalog.list_snapshots("", limit=9, after=page.after)) == ["c-3", "c-4"]

    def test_by_conversation_and_branch(self, catalog: Catalog, rng: Random) -> None:
        for manifest in turns(rng, 2):
            insert(catalog, manifest)
        for manifest in turns(rng, 1, conversation_id="d"):
            insert(catalog, manifest)
        side = turns(rng, 3, branch_name="side")[2]
        insert(catalog, change_manifest(side, snapshot_id="side-3"))
        assert ids(catalog.list_snapshots("", "c")) == ["c-1", "c-2", "side-3"]
        assert ids(catalog.list_snapshots("", "c", "side")) == ["side-3"]
        assert ids(catalog.list_snapshots("", None, "main")) == ["c-1", "d-1", "c-2"]
        assert ids(catalog.list_snapshots("", "unknown")) == []

    @pytest.mark.parametrize(
        "after", ["", "x", "c-1", "1000.0", "1000.0~", "1000.0~.x", "nan~x", "inf~x", "~x", "1~a~b"]
    )
    def test_a_bad_cursor_is_refused(self, catalog: Catalog, after: str) -> None:
        with pytest.raises(InvalidRequestError, match="after"):
            catalog.list_snapshots("", after=after)

    @pytest.mark.parametrize("limit", [0, -1, 1001])
    def test_a_limit_out_of_bounds_is_refused(self, catalog: Catalog, limit: int) -> None:
        for listing in (catalog.list_snapshots, catalog.conversations):
            with pytest.raises(InvalidRequestError, match="limit"):
                listing("", limit=limit)

    def test_conversations_and_branches(self, catalog: Catalog, rng: Random) -> None:
        main = turns(rng, 3)
        for manifest in main:
            insert(catalog, manifest)
        # A branch from turn 2 shares that turn's segments.
        branch = change_manifest(
            main[1], snapshot_id="b-2", branch_name="side", created_at=2000.0, parent_snapshot="c-1"
        )
        insert(catalog, branch)
        insert(catalog, turns(rng, 1, conversation_id="a")[0])
        first, second = catalog.conversations("")
        assert (first.conversation_id, first.snapshots) == ("a", 1)
        assert second.conversation_id == "c"
        assert (second.snapshots, second.branches, second.newest_turn) == (4, 2, 3)
        assert (second.created_at, second.updated_at) == (1001.0, 2000.0)
        files = {ref.segment_id: ref.bytes for turn in main for ref in turn.segments[0]}
        assert second.bytes == sum(files.values())
        assert [c.conversation_id for c in catalog.conversations("", limit=1)] == ["a"]
        assert [c.conversation_id for c in catalog.conversations("", after="a")] == ["c"]
        assert catalog.branches("", "c") == [
            BranchRow("main", 3, 3, 1001.0, 1003.0),
            BranchRow("side", 1, 2, 2000.0, 2000.0),
        ]
        with pytest.raises(NotFoundError, match="no conversation 'z'"):
            catalog.branches("", "z")


class TestSegments:
    def test_each_rank_has_its_own(self, catalog: Catalog, rng: Random) -> None:
        seed = rng.random()
        chains = [
            sample_chain(Random(seed), shard=Shard(SHARD.namespace, rank, 2)) for rank in (0, 1)
        ]
        insert(catalog, sample_manifest(chains))
        for rank, chain in enumerate(chains):
            refs = [segment.ref for segment in chain]
            assert catalog.chain(SHARD.namespace, rank, chain[-1].header.key) == refs
        assert chains[0][0].segment_id != chains[1][0].segment_id

    def test_a_chain_reaches_from_the_start_to_the_state(
        self, catalog: Catalog, rng: Random
    ) -> None:
        first, second, third = sample_turns(rng, [2] * 3)
        insert(catalog, sample_manifest([third], snapshot_id="s3", turn_number=3))
        insert(catalog, sample_manifest([first], snapshot_id="s1", turn_number=1))
        for chain in (first, third):
            refs = [segment.ref for segment in chain]
            assert catalog.chain(SHARD.namespace, 0, refs[-1].key) == refs
        for key in (second[-1].header.key, "ab" * 32):
            with pytest.raises(NotFoundError, match="no snapshot holds the boundary"):
                catalog.chain(SHARD.namespace, 0, key)

    @pytest.mark.parametrize("newest_first", [True, False])
    def test_of_two_chains_with_one_key_the_newest(
        self, catalog: Catalog, rng: Random, newest_first: bool
    ) -> None:
        """The same tokens computed twice: equal keys, different bytes."""
        seed = rng.random()
        old = sample_chain(Random(seed), (3, 2))
        new = same_tokens_other_bytes(rng, old)
        saves = [
            sample_manifest([new], snapshot_id="new", turn_number=2, created_at=9.0),
            sample_manifest([old], snapshot_id="old", turn_number=1, created_at=8.0),
        ]
        for manifest in saves if newest_first else reversed(saves):
            insert(catalog, manifest)
        key = old[-1].header.key
        assert key == new[-1].header.key
        assert catalog.chain(SHARD.namespace, 0, key) == [s.ref for s in new]
        catalog.delete("new")
        assert catalog.chain(SHARD.namespace, 0, key) == [s.ref for s in old]

    def test_segments_are_unreferenced_when_the_last_snapshot_goes(
        self, catalog: Catalog, rng: Random
    ) -> None:
        _, second, third = sample_turns(rng, [2] * 3)
        for turn, chain in ((2, second), (3, third)):
            insert(catalog, sample_manifest([chain], snapshot_id=f"s{turn}", turn_number=turn))
        assert catalog.unreferenced_segments() == []
        catalog.delete("s3")
        last = [UnreferencedSegment(SHARD, s.segment_id, s.header.file_length) for s in third[2:]]
        assert catalog.unreferenced_segments() == last, "rows of its own, and its state"
        assert not catalog.is_referenced(SHARD, third[2].segment_id)
        assert catalog.is_referenced(SHARD, third[1].segment_id)
        assert not catalog.is_referenced(SHARD, "ab" * 32)
        with pytest.raises(NotFoundError):
            catalog.chain(SHARD.namespace, 0, third[-1].header.key)
        catalog.delete("s2")
        assert len(catalog.unreferenced_segments()) == 5
        assert catalog.forget_segments(last) == 2
        assert len(catalog.unreferenced_segments()) == 3

    def test_a_segment_used_in_part_is_one_file(self, catalog: Catalog, rng: Random) -> None:
        whole = sample_chain(rng, (5,))
        part = whole[0].ref.model_copy(update={"end": 3, "key": "cd" * 32})
        rest = sample_segment(rng, parent=whole[0], length=4)
        start = rest.header.model_copy(update={"start": 3, "end": 7})
        own = rest.ref.model_copy(update={"start": start.start, "end": start.end})
        insert(catalog, sample_manifest([whole]))
        insert(
            catalog,
            sample_manifest(
                [[whole[0], rest]],
                snapshot_id="other",
                turn_number=2,
                token_count=7,
                segments=[[part, own]],
            ),
        )
        assert catalog.counts().segments == 3
        assert catalog.counts().segment_bytes == whole[0].ref.bytes + whole[1].ref.bytes + own.bytes
        assert [c.bytes for c in catalog.conversations("")] == [catalog.counts().segment_bytes]
        catalog.delete("snap-1")
        assert [s.segment_id for s in catalog.unreferenced_segments()] == [whole[1].segment_id]
        catalog.delete("other")
        gone = catalog.unreferenced_segments()
        assert {s.segment_id for s in gone} == {s.segment_id for s in (*whole, rest)}
        assert len(gone) == 3
        assert catalog.forget_segments(gone) == 4, "rows of the table"

    def test_a_segment_that_is_named_again_is_not_forgotten(
        self, catalog: Catalog, rng: Random
    ) -> None:
        manifest = insert(catalog, turns(rng, 1)[0])
        catalog.delete(manifest.snapshot_id)
        unreferenced = catalog.unreferenced_segments()
        insert(catalog, manifest)
        assert len(unreferenced) == 2
        assert catalog.forget_segments(unreferenced) == 0
        assert catalog.is_referenced(SHARD, unreferenced[0].segment_id)

    def test_counts(self, catalog: Catalog, rng: Random) -> None:
        assert vars(catalog.counts()) == {
            "snapshots": 0,
            "conversations": 0,
            "segments": 0,
            "segment_bytes": 0,
        }
        manifests = turns(rng, 3)
        for manifest in manifests:
            insert(catalog, manifest)
        insert(catalog, turns(rng, 1, tenant="them")[0])
        counts = catalog.counts()
        assert (counts.snapshots, counts.conversations, counts.segments) == (4, 2, 8)
        assert counts.segment_bytes > manifests[2].bytes


def same_tokens_other_bytes(rng: Random, chain: list[SampleSegment]) -> list[SampleSegment]:
    """A chain over the same tokens and keys, of other sizes and hence other ids."""
    twin: list[SampleSegment] = []
    for segment in chain:
        parent = twin[-1] if twin else None
        if segment.header.has_state:
            assert parent is not None
            other = sample_state(rng, parent)
        else:
            other = sample_segment(rng, parent=parent, length=len(segment.tokens))
        header = other.header.model_copy(update={"key": segment.header.key})
        twin.append(SampleSegment(header, other.payload, segment.tokens, other.segment_id))
    return twin


class TestTransactions:
    def test_all_or_nothing(self, catalog: Catalog, rng: Random) -> None:
        first, second = turns(rng, 2)
        with pytest.raises(RuntimeError):
            insert_and_fail(catalog, first, second)
        assert catalog.all_snapshots() == []
        assert catalog.boundary_keys(SHARD.namespace) == {}

    def test_an_inner_failure_undoes_its_own_part_only(self, catalog: Catalog, rng: Random) -> None:
        first, second, third = turns(rng, 3)
        with catalog.atomic():
            insert(catalog, first)
            with pytest.raises(RuntimeError):
                insert_and_fail(catalog, second)
            insert(catalog, third)
        assert [row.snapshot_id for row in catalog.all_snapshots()] == ["c-1", "c-3"]

    def test_a_change_is_committed_when_the_call_returns(self, tmp_path: Path, rng: Random) -> None:
        with DiskStore.open(tmp_path / "s") as store:
            catalog = Catalog.open(store.catalog_path, store)
            insert(catalog, turns(rng, 1)[0])
            other = sqlite3.connect(store.catalog_path)
            assert other.execute("SELECT snapshot_id FROM snapshots").fetchall() == [("c-1",)]
            assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            other.close()
            catalog.close()

    def test_a_commit_is_synced(self, tmp_path: Path) -> None:
        database = Database.open(tmp_path / "catalog.sqlite")
        full = 2
        with database.atomic():
            row = database.row("PRAGMA synchronous")  # of the connection that writes
        assert row is not None
        assert row[0] == full
        database.close()

    def test_no_reader_waits_for_a_commit(self, catalog: Catalog, rng: Random) -> None:
        first, second = turns(rng, 2)
        insert(catalog, first)
        inserted, go = threading.Event(), threading.Event()

        def write() -> None:
            with catalog.atomic():
                insert(catalog, second)
                assert catalog.get("c-2").turn_number == 2, "who writes sees it"
                inserted.set()
                assert go.wait(60)

        writer = threading.Thread(target=write)
        writer.start()
        assert inserted.wait(60)
        try:
            assert [row.snapshot_id for row in catalog.all_snapshots()] == ["c-1"]
            [*_, last] = first.segments[0]
            assert catalog.chain(SHARD.namespace, 0, last.key) == list(first.segments[0])
        finally:
            go.set()
            writer.join(60)
        assert [row.snapshot_id for row in catalog.all_snapshots()] == ["c-1", "c-2"]

    def test_a_chain_is_read_from_one_state(
        self, catalog: Catalog, rng: Random, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        [only] = turns(rng, 1)
        insert(catalog, only)
        refs = list(only.segments[0])
        real = catalog._db.row

        def deleted_in_between(*args: object) -> object:
            row = real(*args)  # type: ignore[arg-type]
            other = threading.Thread(target=catalog.delete, args=(only.snapshot_id,))
            other.start()
            other.join(60)
            return row

        monkeypatch.setattr(catalog._db, "row", deleted_in_between)
        assert catalog.chain(SHARD.namespace, 0, refs[-1].key) == refs
        monkeypatch.undo()
        with pytest.raises(NotFoundError):
            catalog.chain(SHARD.namespace, 0, refs[-1].key)

    def test_a_full_disk_says_what_is_needed_and_free(self, catalog: Catalog, rng: Random) -> None:
        with catalog.atomic():
            pages = catalog._db.row("PRAGMA page_count")
            assert pages is not None
            catalog._db.row(f"PRAGMA max_page_count = {pages[0]}")
        failed = []
        for manifest in turns(rng, 40):
            try:
                insert(catalog, manifest)
            except StoreFullError as error:
                failed.append(error)
        assert failed, "SQLite's own limit was met"
        assert failed[0].details["needed"] == 4096
        assert isinstance(failed[0].details["free"], int)
        rows = len(catalog.all_snapshots())
        assert rows == 40 - len(failed)

    def test_a_closed_catalog_says_so(self, catalog: Catalog) -> None:
        catalog.close()
        with pytest.raises(StoreError, match="closed"):
            catalog.all_snapshots()
        catalog.close()

    def test_many_threads(self, catalog: Catalog, rng: Random) -> None:
        manifests = [
            sample_manifest([sample_chain(rng, (2, 1))], snapshot_id=f"s{n:02}", turn_number=n)
            for n in range(24)
        ]
        errors: list[BaseException] = []

        def work(part: list[Manifest]) -> None:
            try:
                for manifest in part:
                    insert(catalog, manifest)
                    assert catalog.get(manifest.snapshot_id).turn_number == manifest.turn_number
                    keys = catalog.boundary_keys(SHARD.namespace)
                    assert keys["", manifest.snapshot_id] == [manifest.boundary_key]
                    if manifest.turn_number % 3 == 0:
                        assert catalog.delete(manifest.snapshot_id)
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=work, args=(manifests[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []
        assert {row.turn_number for row in catalog.all_snapshots()} == {
            n for n in range(24) if n % 3
        }
        assert len(catalog.unreferenced_segments()) == 24


def test_a_conversations_listing_walks_its_own_index(catalog: Catalog) -> None:
    plan = catalog._db.rows(
        "EXPLAIN QUERY PLAN SELECT * FROM snapshots WHERE tenant = ? AND conversation_id = ?"
        " AND (+created_at, +snapshot_id) > (?, ?) ORDER BY +created_at, +snapshot_id LIMIT ?",
        ("", "c", -1.0, "", 10),
    )
    assert "conversation_id=?" in " ".join(row["detail"] for row in plan)


def test_totals(catalog: Catalog) -> None:
    counts = catalog.counts()
    assert catalog.totals() == (counts.snapshots, counts.conversations)
