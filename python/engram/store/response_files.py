"""The kept replies of `/v1/responses`: one file each, the newest of them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from engram.errors import InvalidRequestError
from engram.snapshot.response import (
    MAX_RESPONSE_BYTES,
    ResponseRecord,
    decode_response,
    encode_response,
    response_name,
)
from engram.store.base import ResponseStore
from engram.store.durable import (
    DirectoryMaker,
    store_error,
    unlink_durable,
    walk_names,
    write_durable,
)
from engram.store.filesystem import FileSystem
from engram.store.layout import Layout
from engram.store.quarantine import Quarantine
from engram.store.record_files import read_small_file, refuse_newer

VERSION: Final = 1


class DiskResponses(ResponseStore):
    """The response records of a `DiskStore`."""

    _layout: Layout
    _directories: DirectoryMaker
    _quarantine: Quarantine
    _fs: FileSystem

    def put_response(self, record: ResponseRecord) -> int:
        path = self._layout.response(record.name)
        try:
            data = encode_response(record)
        except ValueError as error:
            raise InvalidRequestError(f"response {record.response_id[:80]!r} {error}") from None
        self._directories.ensure(path.parent)
        write_durable(path, [data], needed=len(data), fs=self._fs)
        return len(data)

    def get_response(self, response_id: str) -> ResponseRecord | None:
        path = self._layout.response(response_name(response_id))
        data = read_small_file(path, MAX_RESPONSE_BYTES, self._fs)
        if data is None:
            return None
        try:
            # One that is newer stays where it is.
            refuse_newer(f"the record of response {response_id!r}", data, VERSION)
            record = decode_response(data)
            if record.response_id != response_id:
                raise ValueError("it is the record of another response")
        except ValueError as error:
            self._quarantine.take(path, f"response record: {error}")
            return None
        return record

    def trim_responses(self, count: int, nbytes: int, seconds: float) -> int:
        oldest, total, gone = time.time() - seconds, 0, 0
        for number, (written, size, path) in enumerate(sorted(self._response_files())[::-1]):
            total += size
            if number >= count or total > nbytes or written < oldest:
                unlink_durable(path, self._fs)
                gone += 1
        return gone

    def _response_files(self) -> list[tuple[float, int, Path]]:
        """When each was written, in seconds since the epoch, its bytes, and where it is."""
        found = []
        for directory, names in walk_names(self._layout.responses):
            for name in names:
                if not name.endswith(".json"):
                    continue
                path = directory / name
                try:
                    status = os.stat(path)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise store_error("look at", path, error) from error
                found.append((status.st_mtime, status.st_size, path))
        return found
