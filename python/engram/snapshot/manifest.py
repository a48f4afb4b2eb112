"""The manifest format, version 1: the durable record of one snapshot. The field table is in
``docs/format/manifest.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, Field, JsonValue, ValidationError, field_validator, model_validator

from engram.core.canonical import canonical_json
from engram.errors import (
    InvalidRequestError,
    ManifestCorruptError,
    StoreFormatError,
)
from engram.snapshot.envelope import open_record, seal_record
from engram.snapshot.fields import (
    CLOSED,
    Count,
    Digest,
    Flag,
    Id,
    IdOrEmpty,
    Label,
    PositiveCount,
    Seconds,
    TokenId,
    first_problem,
)
from engram.snapshot.segment import Shard

VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 16 << 20
MAX_USER_METADATA_BYTES: Final = 64 << 10

Durability = Literal["sync", "async"]


class SegmentRef(BaseModel):
    """One segment of a chain, as far as it is used. ``bytes`` is the length of its file.

    Rows may be used in part: up to ``end``, where ``key`` is the page hash.
    """

    model_config = CLOSED

    segment_id: Digest
    key: Digest
    start: Count
    end: PositiveCount
    has_state: Flag
    bytes: PositiveCount

    @model_validator(mode="after")
    def _of_one_kind(self) -> SegmentRef:
        if self.has_state and self.start != self.end:
            raise ValueError("a state's end is its start")
        return self


class LayerConfig(BaseModel):
    """What the model is, for people; matching is the namespace's work."""

    model_config = CLOSED

    num_layers: PositiveCount
    model_type: Label


class Manifest(BaseModel):
    """One snapshot: whose it is, which tokens it covers, and the segments of every rank.

    ``token_count`` is the boundary; ``pending_tokens`` are the recorded tokens past it.
    ``tokens_digest`` is `engram.core.tokens.tokens_digest` of all recorded tokens, pending ones
    included; the first ``prompt_count`` of them are the prompt of its last turn, if that is known.
    ``segments`` has one chain a rank: rows, one after another, and then the state, if the model has
    one. ``bytes`` counts all its segment files, ``unique_bytes`` those this snapshot was
    the first to store. Times are seconds since the epoch.
    """

    model_config = CLOSED

    version: Literal[1] = VERSION
    snapshot_id: Id
    tenant: IdOrEmpty
    conversation_id: Id
    branch_name: Id
    turn_number: Count
    parent_snapshot: Id | None
    created_at: Seconds
    namespace: Digest
    model_name: Label
    layer_config: LayerConfig
    token_count: PositiveCount
    pending_tokens: tuple[TokenId, ...]
    tokens_digest: Digest
    durability: Durability
    segments: Annotated[tuple[tuple[SegmentRef, ...], ...], Field(min_length=1)]
    bytes: PositiveCount
    unique_bytes: Count
    health: Label | None
    user_metadata: dict[str, JsonValue]
    pinned: Flag
    expires_at: Seconds | None
    rid: Label | None
    prompt_count: Count | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        for rank, chain in enumerate(self.segments):
            position = 0
            for ref in rows_of(chain):
                if ref.start != position or ref.end <= ref.start or ref.has_state:
                    raise ValueError(f"segments of rank {rank} do not follow one another")
                position = ref.end
            if position != self.token_count or {ref.end for ref in chain[-1:]} != {position}:
                raise ValueError(f"segments of rank {rank} do not end at token_count")
            if len({ref.key for ref in chain if ref.end == position}) != 1:
                raise ValueError(f"the state of rank {rank} is not that of its rows")
        if len({(chain[-1].key, chain[-1].has_state) for chain in self.segments}) != 1:
            raise ValueError("the ranks' segments end at different boundaries")
        if self.bytes != sum(ref.bytes for chain in self.segments for ref in chain):
            raise ValueError("bytes is not the sum of the segments' bytes")
        if self.prompt_count is not None and self.prompt_count > self.recorded_count:
            raise ValueError("prompt_count is above the number of recorded tokens")
        if self.unique_bytes > self.bytes:
            raise ValueError("unique_bytes is above bytes")
        return self

    @field_validator("user_metadata")
    @classmethod
    def _metadata_bounded(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if len(canonical_json(value)) > MAX_USER_METADATA_BYTES:
            raise ValueError(f"has more than {MAX_USER_METADATA_BYTES} bytes as JSON")
        return value

    @property
    def world_size(self) -> int:
        return len(self.segments)

    def shards(self) -> Iterator[tuple[Shard, tuple[SegmentRef, ...]]]:
        """Each rank's part of the store, and its chain there."""
        for rank, chain in enumerate(self.segments):
            yield Shard(self.namespace, rank, self.world_size), chain

    @property
    def boundary_key(self) -> str:
        """The page hash at ``token_count``."""
        return self.segments[0][-1].key

    @property
    def boundary_keys(self) -> list[str]:
        """The page hashes at which it can be gone on from: where its state is, and if the model
        has none, wherever rows end."""
        chain = self.segments[0]
        return [ref.key for ref in chain if ref.has_state] or [ref.key for ref in chain]

    @property
    def recorded_count(self) -> int:
        """All recorded tokens, pending ones included."""
        return self.token_count + len(self.pending_tokens)


def rows_of(chain: Sequence[SegmentRef]) -> Sequence[SegmentRef]:
    """A chain without the state at its end."""
    return chain[:-1] if chain and chain[-1].has_state else chain


def make_manifest(**fields: Any) -> Manifest:
    """A manifest from its fields. Raises `InvalidRequestError` naming the first wrong one."""
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        raise InvalidRequestError(f"manifest: {first_problem(error)}") from None


def change_manifest(manifest: Manifest, **fields: Any) -> Manifest:
    """``manifest`` with some fields replaced and everything checked again."""
    return make_manifest(**{**manifest.model_dump(), **fields})


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of a manifest file. Raises `InvalidRequestError` above `MAX_MANIFEST_BYTES`."""
    body = manifest.model_dump(mode="json")
    if manifest.prompt_count is None:
        # Manifests were written without it, and one manifest has one form.
        del body["prompt_count"]
    data = seal_record(body)
    if len(data) > MAX_MANIFEST_BYTES:
        raise InvalidRequestError(
            f"the manifest would have {len(data)} bytes, {MAX_MANIFEST_BYTES} are allowed",
            hint="a snapshot with fewer segments, pending tokens or less metadata",
        )
    return data


def decode_manifest(data: bytes) -> Manifest:
    """The manifest in ``data``: verified, every field checked.

    Raises `ManifestCorruptError`, or `StoreFormatError` for an intact manifest of another version.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestCorruptError(f"manifest has {len(data)} bytes, over the limit")
    try:
        body = open_record(data)
    except ValueError as error:
        raise ManifestCorruptError(f"manifest: {error}") from None
    version = body.get("version")
    if type(version) is int and version != VERSION:
        raise StoreFormatError.of("a manifest", version, VERSION)
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        raise ManifestCorruptError(f"manifest: {first_problem(error)}") from None
    # A default filled in, or 5 read as 5.0, would make two files of one manifest.
    if encode_manifest(manifest) != data:
        raise ManifestCorruptError("manifest is not in canonical form")
    return manifest
