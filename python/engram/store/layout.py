"""Where things lie below the store's root. Names are digests or numbers, never user input."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engram.errors import InvalidRequestError
from engram.snapshot.segment import Shard

SEGMENT_SUFFIX: Final = ".seg"
MANIFEST_SUFFIX: Final = ".json"
_SHARD_NAME: Final = re.compile(r"rank-(\d{1,9})-of-(\d{1,9})", re.ASCII)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class Layout:
    """Paths of one store. The tree is drawn in ``docs/format/store.md``."""

    root: Path

    @property
    def marker(self) -> Path:
        return self.root / "engram-store.json"

    @property
    def keyring(self) -> Path:
        return self.root / "keyring.json"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def reserve(self) -> Path:
        return self.root / "reserve"

    @property
    def catalog(self) -> Path:
        return self.root / "catalog.sqlite"

    @property
    def segments(self) -> Path:
        return self.root / "segments"

    @property
    def manifests(self) -> Path:
        return self.root / "manifests"

    @property
    def namespaces(self) -> Path:
        return self.root / "namespaces"

    @property
    def conversations(self) -> Path:
        return self.root / "conversations"

    @property
    def responses(self) -> Path:
        return self.root / "responses"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    def segment(self, shard: Shard, segment_id: str) -> Path:
        """Raises `InvalidRequestError` for an id that is no digest."""
        _require_digest("segment id", segment_id)
        return self._shard(shard) / segment_id[:2] / (segment_id + SEGMENT_SUFFIX)

    def manifest(self, name: str) -> Path:
        return self.manifests / name[:2] / name

    def conversation(self, name: str) -> Path:
        return self.conversations / name[:2] / name

    def response(self, name: str) -> Path:
        return self.responses / name[:2] / name

    def namespace(self, namespace_id: str) -> Path:
        """Raises `InvalidRequestError` for an id that is no digest."""
        _require_digest("namespace id", namespace_id)
        return self.namespaces / (namespace_id + ".json")

    def shards(self) -> Iterator[tuple[Shard, Path]]:
        """The shards that have a directory. Anything else lying there is passed over."""
        for namespace in _directories(self.segments):
            for path in _directories(namespace):
                match = _SHARD_NAME.fullmatch(path.name)
                if match and is_digest(namespace.name):
                    yield Shard(namespace.name, int(match[1]), int(match[2])), path

    def _shard(self, shard: Shard) -> Path:
        _require_digest("namespace id", shard.namespace)
        return self.segments / shard.namespace / f"rank-{shard.rank}-of-{shard.world_size}"


def is_digest(text: str) -> bool:
    """Whether ``text`` is 64 lower-case hex digits."""
    return _DIGEST.fullmatch(text) is not None


def _require_digest(what: str, text: str) -> None:
    if not is_digest(text):
        raise InvalidRequestError(f"{what} {text[:80]!r} is not 64 lower-case hex digits")


def _directories(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir()) if path.is_dir() else []
