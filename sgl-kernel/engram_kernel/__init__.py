"""Native CPU kernels of Engram's conditional memory, over numpy arrays.

Every function releases the GIL while it computes. Arrays of another dtype or shape, or not
C-contiguous, raise ValueError. Ids must be rows of the table, and are not looked at:
`engram.conditional_memory` checks them. Where a function takes ``out``, that array is filled and
returned: fresh memory costs a page fault every 4 KiB, which large results feel.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

__version__ = "0.1.0"
__all__ = ["ABI_VERSION", "gather", "hash_gather", "hash_window", "instruction_set", "read_rows"]

Int64Array = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class Plan(ctypes.Structure):
    """`engram::Plan` of csrc/hash.h; keeps the arrays it points to."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("polynomial", "min_n", "max_n", "heads")),
        *((name, ctypes.c_int64) for name in ("pad", "blocks")),
        *((name, ctypes.c_void_p) for name in ("multipliers", "moduli", "sizes", "offsets")),
    )

    def __init__(
        self,
        *,
        polynomial: bool,
        min_n: int,
        max_n: int,
        heads: int,
        pad: int,
        blocks: bool,
        multipliers: Int64Array,
        moduli: Int64Array,
        sizes: Int64Array,
        offsets: Int64Array,
    ) -> None:
        arrays = [_int64(array) for array in (multipliers, moduli, sizes, offsets)]
        pointers = [array.ctypes.data for array in arrays]
        super().__init__(polynomial, min_n, max_n, heads, pad, blocks, *pointers)
        self.arrays = arrays
        self.columns = (max_n - min_n + 1) * heads


def _load() -> ctypes.CDLL:
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (path := folder / f"_native{suffix}").exists():
            return ctypes.CDLL(str(path))
    raise OSError(f"no library in {folder}; install the package instead of using its source")


_library = _load()
for _name in ("engram_hash", "engram_gather", "engram_hash_gather"):
    getattr(_library, _name).restype = None
_library.engram_abi_version.restype = ctypes.c_int64
_library.engram_read_rows.restype = ctypes.c_int64
_library.engram_instruction_set.restype = ctypes.c_char_p

ABI_VERSION: int = _library.engram_abi_version()


def instruction_set() -> str:
    """What the hash uses on this machine: `avx512`, `avx2` or `baseline`."""
    return str(_library.engram_instruction_set().decode())


def hash_window(
    plan: Plan,
    window: Int64Array,
    dtype: npt.DTypeLike = np.int64,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """``window`` [B, max_n - 1 + T] to rows [B, T, columns] of ``dtype`` int64 or int32."""
    window = _int64(window)
    if np.dtype(dtype) not in (np.int64, np.int32):
        raise ValueError(f"rows are int64 or int32, not {np.dtype(dtype)}")
    out = _out(out, (*_shape(plan, window), plan.columns), np.dtype(dtype))
    narrow = ctypes.c_int64(out.dtype == np.int32)
    batch, tokens = _sizes(out.shape[:2])
    _library.engram_hash(ctypes.byref(plan), _at(window), batch, tokens, narrow, _at(out))
    return out


def gather(table: Bytes, ids: Int64Array, threads: int = 1, out: Bytes | None = None) -> Bytes:
    """Rows ``ids`` [n] of ``table`` [rows, row_bytes]: [n, row_bytes]."""
    ids = _one_dimensional(ids)
    _check_table(table)
    out = _out(out, (len(ids), table.shape[1]), np.dtype(np.uint8))
    sizes = _sizes((len(ids), threads))
    width = ctypes.c_int64(table.shape[1])
    _library.engram_gather(_at(table), width, _at(ids), *sizes, _at(out))
    return out


def hash_gather(
    plan: Plan, window: Int64Array, table: Bytes, threads: int = 1, out: Bytes | None = None
) -> Bytes:
    """Rows of ``table`` for every column of every token: [B * T * columns, row_bytes]."""
    window = _int64(window)
    batch, tokens = _shape(plan, window)
    _check_table(table)
    shape = (batch * tokens * plan.columns, table.shape[1])
    out = _out(out, shape, np.dtype(np.uint8))
    sizes = _sizes((table.shape[1], threads))
    _library.engram_hash_gather(
        ctypes.byref(plan), _at(window), *_sizes((batch, tokens)), _at(table), *sizes, _at(out)
    )
    return out


def read_rows(
    files: npt.NDArray[np.int32], offsets: Int64Array, row_bytes: int, threads: int = 1
) -> Bytes:
    """Rows at byte ``offsets`` [n] of file descriptors ``files`` [n]: [n, row_bytes].

    Raises OSError with the errno of the read that failed; ENODATA: a file is too short.
    """
    offsets = _one_dimensional(offsets)
    files = np.ascontiguousarray(files, dtype=np.int32)
    if files.shape != offsets.shape or row_bytes < 1:
        raise ValueError(f"{files.shape} files, {offsets.shape} offsets, rows of {row_bytes} bytes")
    out = np.empty((len(offsets), row_bytes), dtype=np.uint8)
    sizes = _sizes((len(offsets), row_bytes, threads))
    error = _library.engram_read_rows(_at(files), _at(offsets), *sizes, _at(out))
    if error:
        raise OSError(error, os.strerror(error))
    return out


def _out(out: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """``out`` if it fits, or a new array."""
    if out is None:
        return np.empty(shape, dtype=dtype)
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
        raise ValueError(f"out must be contiguous {dtype} {shape}, not {out.dtype} {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out must be writable")
    return out


def _shape(plan: Plan, window: Int64Array) -> tuple[int, int]:
    if window.ndim != 2 or window.shape[1] < plan.max_n - 1:
        raise ValueError(f"window must be [B, {plan.max_n - 1} + T], not {window.shape}")
    return window.shape[0], window.shape[1] - plan.max_n + 1


def _check_table(table: Bytes) -> None:
    if table.ndim != 2 or table.dtype != np.uint8 or not table.flags.c_contiguous:
        raise ValueError(
            f"table must be contiguous uint8 [rows, row_bytes], not {table.dtype} {table.shape}"
        )


def _one_dimensional(array: Int64Array) -> Int64Array:
    array = _int64(array)
    if array.ndim != 1:
        raise ValueError(f"ids and offsets must be [n], not {array.shape}")
    return array


def _int64(array: Int64Array) -> Int64Array:
    if array.dtype.kind not in "iu":
        raise ValueError(f"ids must be integers, not {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _at(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _sizes(values: tuple[int, ...]) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]
