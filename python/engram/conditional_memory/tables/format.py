"""A table on disk: a folder with `table.json` and shards of rows.

`table.json` is written last, durably; a folder without it is a table not finished. Its fields, all
required and no others::

    {"format": "engram-table", "version": 1, "rows": R, "dim": D, "dtype": "fp32|bf16|fp8",
     "shard_rows": S, "digests": ["<blake3 of shard 0>", ...]}

Shard i is the file `rows-<i, five digits>.bin`: rows i * S up to (i + 1) * S - 1 without gaps
(`tables/rows.py` says how a row lies in bytes), then zeros up to a multiple of 4096 bytes, so that
aligned reads never cross its end. The digest covers the whole file. While a table is written, the
digest of each finished shard stands in `rows-<i>.digest`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from engram.conditional_memory.tables.rows import RowFormat
from engram.errors import InvalidRequestError, StoreError, StoreFormatError

HEADER: Final = "table.json"
VERSION: Final = 1
PAGE: Final = 4096
_NAME: Final = "engram-table"
_MAX_HEADER: Final = 64 << 20


@dataclass(frozen=True)
class TableHeader:
    """The content of `table.json`."""

    rows: int
    dim: int
    dtype: str
    shard_rows: int
    digests: tuple[str, ...]

    def __post_init__(self) -> None:
        if min(self.rows, self.dim, self.shard_rows) < 1:
            raise InvalidRequestError(
                "rows, dim and shard_rows of a table must be at least 1, "
                f"not {self.rows}, {self.dim}, {self.shard_rows}"
            )

    @property
    def row_format(self) -> RowFormat:
        """`dtype` as a `RowFormat`."""
        return RowFormat.parse(self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.row_format.row_bytes(self.dim)

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.rows // self.shard_rows)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the first after it."""
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.rows)

    def shard_bytes(self, shard: int) -> int:
        """Size of a shard's file."""
        start, end = self.shard_range(shard)
        return -(-(end - start) * self.row_bytes // PAGE) * PAGE

    def encode(self) -> bytes:
        """The file's bytes."""
        fields = {"format": _NAME, "version": VERSION, **asdict(self)}
        return json.dumps(fields, indent=1).encode() + b"\n"

    @classmethod
    def read(cls, folder: Path) -> TableHeader:
        """The header of the table in ``folder``.

        Raises:
            InvalidRequestError: there is none, or it is not what the format says.
            StoreFormatError: it has a version this build does not know.
            StoreError: it cannot be read.
        """
        path = folder / HEADER
        try:
            with path.open("rb") as file:
                fields = json.loads(file.read(_MAX_HEADER))
        except FileNotFoundError:
            raise InvalidRequestError(
                f"{folder} holds no finished table",
                hint="make one with DiskTable.create; called again, it goes on where it stopped",
            ) from None
        except (ValueError, RecursionError) as error:
            raise _damaged(path, str(error)) from error
        except OSError as error:
            raise StoreError(
                f"cannot read {path}: {error.strerror}", hint="check the folder and its permissions"
            ) from error
        if not isinstance(fields, dict) or fields.pop("format", None) != _NAME:
            raise _damaged(path, f"it is no {_NAME}")
        if (version := fields.pop("version", None)) != VERSION:
            raise StoreFormatError.of(str(path), version, VERSION)
        return cls._checked(path, fields)

    @classmethod
    def _checked(cls, path: Path, fields: dict[str, object]) -> TableHeader:
        numbers = {k: v for k, v in fields.items() if type(v) is int}
        digests, dtype = fields.get("digests"), fields.get("dtype")
        wanted = {"rows", "dim", "shard_rows", "dtype", "digests"}
        if (
            set(fields) != wanted
            or set(numbers) != {"rows", "dim", "shard_rows"}
            or not isinstance(dtype, str)
            or not isinstance(digests, list)
            or not all(isinstance(d, str) and len(d) == 64 for d in digests)
        ):
            raise _damaged(path, f"its fields are not {', '.join(sorted(wanted))}")
        header = cls(**numbers, dtype=dtype, digests=tuple(digests))
        if len(header.digests) != header.shards:
            raise _damaged(path, f"{header.shards} shards have {len(header.digests)} digests")
        return header


def shard_path(folder: Path, shard: int) -> Path:
    """The file of a shard's rows."""
    return folder / f"rows-{shard:05d}.bin"


def digest_path(folder: Path, shard: int) -> Path:
    """The file that says that a shard is finished, while others are not."""
    return folder / f"rows-{shard:05d}.digest"


def _damaged(path: Path, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"{path} is damaged: {reason}", hint="make the table again")
