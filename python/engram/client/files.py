"""Archives on this side: a file that is sent in pieces, and one that is written as it comes."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

from engram.errors import AlreadyExistsError, InvalidRequestError

PIECE_BYTES: Final = 1 << 20


def pieces_of(path: Path) -> Iterator[bytes]:
    """A file in pieces.  `InvalidRequestError` if it cannot be read."""
    with _usable(path, "read"), path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


async def pieces_of_async(path: Path) -> AsyncIterator[bytes]:
    """The same, read on other threads."""
    pieces = pieces_of(path)
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


class Download:
    """A file that is there when all of it is, and else as it was before.

    Raises `AlreadyExistsError` if there is one and it is not to be replaced, `InvalidRequestError`
    if it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, replace: bool) -> None:
        self.path = Path(path)
        self.bytes = 0
        self._replace = replace
        self._part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}.part")
        self._file: BinaryIO

    def write(self, piece: bytes) -> None:
        """Add a piece."""
        with _usable(self.path, "written"):
            self._file.write(piece)
        self.bytes += len(piece)

    def __enter__(self) -> Download:
        if self.path.exists() and not self._replace:
            raise _taken(self.path)
        with _usable(self.path, "written"):
            self._file = self._part.open("xb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with _usable(self.path, "written"), self._file:
                if error is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._publish()
        finally:
            self._part.unlink(missing_ok=True)

    def _publish(self) -> None:
        if self._replace:
            self._part.replace(self.path)
            return
        try:
            # Unlike a rename it fails for a file that has come in between.
            os.link(self._part, self.path)
        except FileExistsError:
            raise _taken(self.path) from None


def _taken(path: Path) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"there is a file {path} already",
        hint="replace=True writes over it",
        details={"path": str(path)},
    )


@contextmanager
def _usable(path: Path, verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidRequestError(
            f"{path} cannot be {verb}: {error.strerror or error}", details={"path": str(path)}
        ) from error
