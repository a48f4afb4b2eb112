"""Tables out of safetensors checkpoints, block by block: the whole is never in memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from engram.conditional_memory.tables.base import Bytes
from engram.conditional_memory.tables.disk import DiskTable
from engram.conditional_memory.tables.rows import RowFormat
from engram.errors import InvalidRequestError

_FORMATS: Final = {"F32": RowFormat.FP32, "BF16": RowFormat.BF16, "F8_E4M3": RowFormat.FP8}
_SCALES: Final = ("F8_E8M0", "U8")
_ITEM_BYTES: Final = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1}
_MAX_HEADER: Final = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class _Part:
    """A tensor [rows, ...] in a file."""

    path: Path
    dtype: str
    rows: int
    row_bytes: int
    offset: int

    def read(self, start: int, end: int) -> Bytes:
        """Rows as bytes [end - start, row_bytes]. Plain reads: a mapping would count as memory."""
        out = np.empty((end - start, self.row_bytes), dtype=np.uint8)
        with self.path.open("rb") as file:
            file.seek(self.offset + start * self.row_bytes)
            if file.readinto(out.data) != out.nbytes:
                raise InvalidRequestError(f"{self.path} ends early", hint="download it again")
            # What was read once is not needed again, and would push out what is.
            os.posix_fadvise(file.fileno(), self.offset, 0, os.POSIX_FADV_DONTNEED)
        return out


class SafetensorsRows:
    """The rows of a tensor that lies, one part after the other, in several files.

    Args:
        files: in the order of their rows. A file without the tensor is passed over.
        name: of the tensor [rows, dim] in each.

    Raises:
        InvalidRequestError: no file has it, a file is no safetensors file, or the parts have
            different dtypes or widths.
    """

    def __init__(self, files: Iterable[Path | str], name: str) -> None:
        found = (_find(Path(file), name) for file in files)
        self._parts = [part for part in found if part is not None]
        if not self._parts:
            raise InvalidRequestError(
                f"none of the files has a tensor {name!r}", hint="name the files of the checkpoint"
            )
        if len({(part.dtype, part.row_bytes) for part in self._parts}) != 1:
            raise InvalidRequestError(f"the parts of {name!r} have different dtypes or widths")
        self._starts = np.cumsum([0, *(part.rows for part in self._parts)]).tolist()
        self.dtype = self._parts[0].dtype
        self.row_bytes = self._parts[0].row_bytes
        self.rows: int = self._starts[-1]

    def read(self, start: int, end: int) -> Bytes:
        """Rows start .. end - 1 as bytes [end - start, row_bytes]."""
        pieces = [
            part.read(max(start, first) - first, min(end, first + part.rows) - first)
            for part, first in zip(self._parts, self._starts[:-1], strict=True)
            if first < end and first + part.rows > start
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def table_from_safetensors(
    folder: Path | str,
    files: Sequence[Path | str],
    name: str,
    scale_name: str | None = None,
    **options: Any,
) -> DiskTable:
    """Write the table in tensor ``name`` of ``files`` to ``folder``, and open it.

    An fp8 table (V4.1: ``layers.<i>.engram.embed.weight``) needs the tensor of its exponents,
    ``scale_name`` (V4.1: ``layers.<i>.engram.embed.scale``). About 8 MiB are in memory at a time;
    stopped, the same call goes on where it was. ``options``: of `DiskTable.create`.

    Raises:
        InvalidRequestError: the tensors are not there or do not fit each other.
    """
    numbers = SafetensorsRows(files, name)
    if numbers.dtype not in _FORMATS:
        raise InvalidRequestError(
            f"a table cannot have dtype {numbers.dtype}", hint=f"it can have {', '.join(_FORMATS)}"
        )
    row_format = _FORMATS[numbers.dtype]
    dim = numbers.row_bytes // _ITEM_BYTES[numbers.dtype]
    fill = numbers.read
    if row_format is RowFormat.FP8:
        scales = _scales(files, scale_name, numbers, row_format.row_bytes(dim) - dim)

        def fill(start: int, end: int) -> Bytes:
            return np.concatenate([numbers.read(start, end), scales.read(start, end)], axis=1)

    return DiskTable.create(folder, numbers.rows, dim, row_format, fill, **options)


def _scales(
    files: Sequence[Path | str], name: str | None, numbers: SafetensorsRows, width: int
) -> SafetensorsRows:
    if name is None:
        raise InvalidRequestError(
            "an fp8 table needs its exponents", hint="name their tensor as scale_name"
        )
    scales = SafetensorsRows(files, name)
    wanted = (numbers.rows, width)
    if scales.dtype not in _SCALES or (scales.rows, scales.row_bytes) != wanted:
        raise InvalidRequestError(
            f"{name!r} is {scales.dtype} [{scales.rows}, {scales.row_bytes}]",
            hint=f"the exponents of this table are {' or '.join(_SCALES)} {list(wanted)}",
        )
    return scales


def _find(path: Path, name: str) -> _Part | None:
    """The tensor in the file; None if it is not there."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER:
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        if name not in header:
            return None
        tensor = header[name]
        dtype, shape, (begin, end) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError(f"{name!r} has shape {shape} at {begin} to {end}")
        row_bytes = math.prod(shape[1:]) * _ITEM_BYTES.get(dtype, 0)
        if dtype in _ITEM_BYTES and (len(shape) != 2 or shape[0] * row_bytes != end - begin):
            raise ValueError(f"{name!r} has shape {shape} and {end - begin} bytes")
        return _Part(path, dtype, shape[0], row_bytes, 8 + length + begin)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidRequestError(
            f"{path} cannot be read as a safetensors file: {error}", hint="download it again"
        ) from error
