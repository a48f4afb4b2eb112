"""The contract every store keeps.

Law of every method that writes: when it returns, the change is durable (it survives power loss);
when it raises, readers see the store as it was before, except that a whole, valid segment nobody
refers to may have been left. A reader never sees a partial file, at any instant.

All methods may be called from several threads. Segments may be written and read by several
processes at once; manifests are written by the one process that holds the store's lock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

from engram.core.namespace import Namespace
from engram.core.tokens import TokenArray
from engram.snapshot.conversation import ConversationRecord
from engram.snapshot.listing import DamagedManifest, ManifestEntry
from engram.snapshot.manifest import Manifest
from engram.snapshot.response import ResponseRecord
from engram.snapshot.segment import SegmentHeader, Shard

BufferProvider: TypeAlias = Callable[[SegmentHeader], memoryview]
"""Gives a writable buffer of ``header.payload_length`` bytes to read a payload into.

It is called before the digest is checked: the header is well formed and its sizes agree with the
file's, but nothing in it may be trusted until `SegmentStore.read_segment` returns.
"""

HeaderCheck: TypeAlias = Callable[[SegmentHeader], None]
"""Looks at a header before its payload is read; trusted as little as by a `BufferProvider`."""


@dataclass(frozen=True)
class StoredSegment:
    """A segment found by a listing.

    ``bytes`` is what it takes there, encryption included, ``written_at`` when it was written, in
    seconds since the epoch.
    """

    shard: Shard
    segment_id: str
    bytes: int
    written_at: float


class SegmentStore(ABC):
    """Content-addressed segments.

    Errors of all methods: `StoreError` (and `StoreFullError` when writing) for what the device
    refuses, `StoreFormatError` for an intact segment of a newer version, `EncryptionKeyError` when
    reading one that is encrypted under a key the store does not have.
    """

    @abstractmethod
    def put_segment(
        self, header: SegmentHeader, payload: memoryview, segment_id: str | None = None
    ) -> str:
        """Store a segment and return its id. Idempotent: one that is there is not written again.

        One that is there is verified first, since whoever is told that it is stored relies on it;
        what is damaged or cannot be read gives way to the new file.
        ``payload`` is hashed while it is written; if ``segment_id`` is given and is not its digest
        (memory reused too early), nothing is stored and `InternalError` is raised.
        """

    @abstractmethod
    def has_segment(self, shard: Shard, segment_id: str, length: int | None = None) -> bool:
        """Whether the segment is there, and if given, whether its file has ``length`` bytes.

        That is the length a manifest has, of the segment file in the clear. Cheap: says nothing
        about its bytes being intact.
        """

    @abstractmethod
    def read_segment(self, shard: Shard, segment_id: str, into: BufferProvider) -> SegmentHeader:
        """Read the payload into the buffer ``into`` gives, verify it, return the header.

        Returns only after the digest was compared. A damaged segment is quarantined and
        `SegmentCorruptError` raised (also for a missing one); the buffer then holds garbage.
        What ``into`` raises passes through.
        """

    @abstractmethod
    def verify_segment(self, shard: Shard, segment_id: str) -> SegmentHeader:
        """`read_segment` without keeping the payload, in bounded memory."""

    @abstractmethod
    def iter_payload(
        self, shard: Shard, segment_id: str, check: HeaderCheck | None = None
    ) -> Iterator[memoryview]:
        """The payload in pieces of bounded size, each valid until the next is asked for.

        Nothing of it may be relied on until the iterator has ended: it raises
        `SegmentCorruptError` where it would, if the digest is another. ``check`` is given the
        header before the first piece; what it raises passes through.
        """

    @abstractmethod
    def read_tokens(self, shard: Shard, segment_id: str) -> tuple[SegmentHeader, TokenArray]:
        """Header and token ids only: cheap, and not verified by the segment's digest.

        The caller checks the tokens of a whole chain against the manifest's ``tokens_digest``.
        """

    @abstractmethod
    def delete_segment(self, shard: Shard, segment_id: str) -> None:
        """Remove a segment. One that is not there is no error.

        The caller sees to it that no save is relying on the segment meanwhile.
        """

    @abstractmethod
    def iter_segments(self) -> Iterator[StoredSegment]:
        """All segments, in no order. Those written or removed meanwhile may or may not appear."""


class NamespaceStore(ABC):
    """Descriptions of namespaces, so that a mismatch can name the field. Errors as above."""

    @abstractmethod
    def put_namespace(self, namespace: Namespace) -> None:
        """Store a namespace's description. Idempotent."""

    @abstractmethod
    def get_namespace(self, namespace_id: str) -> Namespace:
        """A namespace's description; `NotFoundError` if none, or only a damaged one, is stored."""


class ManifestStore(ABC):
    """Manifests by (snapshot id, tenant). Errors as above."""

    @abstractmethod
    def put_manifest(self, manifest: Manifest, *, replace: bool = False) -> ManifestEntry:
        """Store a manifest atomically.

        `AlreadyExistsError` if its snapshot id is taken, unless ``replace``; a replacement whose
        error comes at the very last step (the directory's fsync) may have taken place.
        """

    @abstractmethod
    def get_manifest(self, snapshot_id: str, tenant: str = "") -> Manifest:
        """A verified manifest. `NotFoundError`, or `ManifestCorruptError` for one that is damaged,
        which is quarantined, or lies in quarantine already."""

    @abstractmethod
    def delete_manifest(self, snapshot_id: str, tenant: str = "") -> None:
        """Remove a manifest. One that is not there is no error."""

    @abstractmethod
    def manifest_names(self) -> set[str]:
        """The names of all stored manifests."""

    @abstractmethod
    def manifest_entry(self, name: str) -> ManifestEntry | None:
        """One manifest of the listing; None if it is not there."""

    @abstractmethod
    def list_manifests(self) -> list[ManifestEntry]:
        """All stored manifests by name, without reading them."""

    @abstractmethod
    def load_manifest(self, entry: ManifestEntry) -> Manifest | DamagedManifest:
        """One listed manifest, verified; damage is quarantined and reported, not raised.

        An intact manifest of a newer version is reported too and stays where it is.
        """

    def iter_manifests(self) -> Iterator[Manifest | DamagedManifest]:
        """All manifests of the listing, one after another."""
        for entry in self.list_manifests():
            yield self.load_manifest(entry)


class ConversationStore(ABC):
    """Records of what was set of conversations. Errors as above."""

    @abstractmethod
    def put_conversation(self, record: ConversationRecord) -> None:
        """Store a conversation's record, in place of the one there is."""

    @abstractmethod
    def delete_conversation(self, record: ConversationRecord) -> None:
        """Remove a conversation's record. One that is not there is no error."""

    @abstractmethod
    def iter_conversations(self) -> Iterator[ConversationRecord]:
        """All records, verified. A damaged one is quarantined and left out; so is, in place, one of
        a newer version."""


class ResponseStore(ABC):
    """Kept replies of `/v1/responses`. Errors as above."""

    @abstractmethod
    def put_response(self, record: ResponseRecord) -> int:
        """Store a response's record, in place of the one there is, durable on return; its bytes.

        `InvalidRequestError` for one that is too long.
        """

    @abstractmethod
    def get_response(self, response_id: str) -> ResponseRecord | None:
        """A response's record, verified; None if there is none. A damaged one is quarantined, and
        then there is none; `StoreFormatError` for one of a newer version."""

    @abstractmethod
    def trim_responses(self, count: int, nbytes: int, seconds: float) -> int:
        """Remove all records but the newest ``count``, and the newest that have ``nbytes``
        together, and those written more than so many ``seconds`` ago; how many."""


@dataclass(frozen=True)
class StoreHealth:
    """What is wrong, or was and has been healed; sizes in bytes.

    ``quarantined`` files are held now; ``marker_rebuilt`` and ``removed_temps`` (temporary files
    that a crash had left) are of the opening. ``free_bytes`` is None where it cannot be told.
    """

    quarantined: int
    quarantined_bytes: int
    marker_rebuilt: bool
    removed_temps: int
    free_bytes: int | None


class Store(SegmentStore, NamespaceStore, ManifestStore, ConversationStore, ResponseStore):
    """All of them: what a server keeps its snapshots in."""

    @abstractmethod
    def remains_of_manifests(
        self, names: Iterable[str] = (), *, but: Container[str] = ()
    ) -> Iterator[bytes]:
        """What can be read of the manifests in quarantine, but for those that had the names
        ``but``, and of the stored ones of these ``names``: however damaged, at most
        `MAX_MANIFEST_BYTES` of each."""

    @abstractmethod
    def remove_abandoned_temps(self) -> int:
        """Remove temporary files that crashes have left; how many. Those being written stay."""

    @abstractmethod
    def health(self) -> StoreHealth:
        """What an operator wants to know of the store, without a walk over it."""

    @abstractmethod
    def reserve_at_hand(self) -> AbstractContextManager[None]:
        """What is done within may use a little room that is kept back, if the device is full.

        For what makes room by writing first: removing a snapshot, opening the catalog.
        """
