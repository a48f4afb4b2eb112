"""The functions of `engram_kernel` themselves: outputs, threads, odd sizes, and errors."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from engram.conditional_memory import EngramConfig, HostTable, NgramHashLayout

engram_kernel = pytest.importorskip("engram_kernel")
NativeKernel = pytest.importorskip("engram.conditional_memory.native").NativeKernel


def test_gather_copies_rows_of_every_size(seed: int) -> None:
    """From and to every alignment, and not one byte beside the rows."""
    random = np.random.default_rng(seed)
    for row_bytes in range(1, 601):
        room = random.integers(0, 256, 64 + 37 * row_bytes, dtype=np.uint8)
        table = room[(skip := random.integers(0, 64)) :][: 37 * row_bytes].reshape(37, row_bytes)
        for count in (1, 33):
            ids = random.integers(0, 37, count)
            target = np.full(128 + count * row_bytes, 171, dtype=np.uint8)
            skip = int(random.integers(0, 64))
            out = target[skip : skip + count * row_bytes].reshape(count, row_bytes)
            assert engram_kernel.gather(table, ids, 1, out) is out
            assert np.array_equal(out, table[ids]), row_bytes
            assert (target[:skip] == 171).all()
            assert (target[skip + out.size :] == 171).all(), row_bytes


@pytest.mark.parametrize("row_bytes", [1, 7, 63, 64, 65, 128, 264, 5000])
@pytest.mark.parametrize("threads", [1, 3])
def test_gather(row_bytes: int, threads: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    table = random.integers(0, 256, (97, row_bytes), dtype=np.uint8)
    for count in (0, 1, 2, 31, 33, 1000):
        ids = random.integers(0, 97, count)
        # A guard behind the last row, which nothing may be written to.
        room = np.full((count + 1, row_bytes), 171, dtype=np.uint8)
        out = engram_kernel.gather(table, ids, threads, room[:count])
        assert np.array_equal(out, table[ids])
        assert (room[count] == 171).all()
        assert np.array_equal(engram_kernel.gather(table, ids, threads), table[ids])


@pytest.mark.parametrize("row_bytes", [1, 264, 4096, 9000])
@pytest.mark.parametrize("threads", [1, 4])
def test_read_rows(row_bytes: int, threads: int, tmp_path: Path, seed: int) -> None:
    """From two files, in any order, with neighbours that share a read."""
    random = np.random.default_rng(seed)
    rows = random.integers(0, 256, (2, 500, row_bytes), dtype=np.uint8)
    files = []
    for index in range(2):
        path = tmp_path / str(index)
        path.write_bytes(rows[index].tobytes() + bytes(-rows[index].size % 4096))
        files.append(os.open(path, os.O_RDONLY | os.O_DIRECT))
    which = random.integers(0, 2, 300)
    ids = np.concatenate([random.integers(0, 500, 200), np.arange(400, 500)])
    handles = np.array(files, dtype=np.int32)[which]
    got = engram_kernel.read_rows(handles, ids * row_bytes, row_bytes, threads)
    assert np.array_equal(got, rows[which, ids])
    with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
        engram_kernel.read_rows(handles[:1], np.array([500 * row_bytes + 4096]), row_bytes)
    for file in files:
        os.close(file)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        engram_kernel.read_rows(handles[:1], np.array([0]), row_bytes)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("layout", "heads"), [("official", 8), ("v41", 11), ("polynomial", 3)])
def test_hash_and_gather_in_one_pass(layout: str, heads: int, threads: int, seed: int) -> None:
    config = EngramConfig(
        vocab_size=300,
        max_n=4,
        num_hash_heads=heads,
        embedding_table_size=5000,
        layer_ids=[1],
        layout=layout,
        image_token_id=9 if layout == "v41" else None,
    )
    hashes = NgramHashLayout(config)
    table = HostTable(hashes.rows(), 32, "fp8", threads=threads)
    table.data[:] = np.random.default_rng(seed).integers(0, 120, table.data.shape, dtype=np.uint8)
    for length in (0, 1, 200, 777):
        window = hashes.window(hashes.start(2), torch.randint(0, 300, (2, length)))
        expected = table.gather(hashes.hash_window(window, backend="numpy")).flatten(-2)
        assert torch.equal(table.lookup(hashes, window), expected)


def test_an_output_that_does_not_fit_is_refused() -> None:
    table = np.zeros((5, 8), np.uint8)
    for out in (np.zeros((2, 8), np.uint8), np.zeros((3, 8), np.int8), np.zeros((3, 16), np.uint8)):
        with pytest.raises(ValueError, match="out must be contiguous uint8"):
            engram_kernel.gather(table, np.zeros(3, np.int64), 1, out)


@pytest.mark.parametrize(
    "table",
    [
        np.zeros((5, 16), np.uint8)[:, ::2],
        np.asfortranarray(np.zeros((5, 8), np.uint8)),
        np.zeros((5, 2), np.float32),
        np.zeros(40, np.uint8),
    ],
    ids=["strided", "fortran", "float32", "flat"],
)
def test_a_table_that_is_no_rows_of_bytes_is_refused(table: np.ndarray) -> None:
    """The kernel sees an address alone, and would have read other bytes."""
    hashes = NgramHashLayout(EngramConfig(vocab_size=9, embedding_table_size=2, layer_ids=[1]))
    plan = NativeKernel()._native(hashes.plan(), True)
    with pytest.raises(ValueError, match="table must be contiguous uint8"):
        engram_kernel.gather(table, np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="table must be contiguous uint8"):
        engram_kernel.hash_gather(plan, np.zeros((1, 5), np.int64), table)


def test_an_output_that_may_not_be_written_is_refused() -> None:
    out = np.frombuffer(bytes(24), np.uint8).reshape(3, 8)
    with pytest.raises(ValueError, match="out must be writable"):
        engram_kernel.gather(np.ones((5, 8), np.uint8), np.zeros(3, np.int64), 1, out)
    assert not out.any()


def test_ids_of_another_kind_are_refused() -> None:
    table = np.zeros((5, 8), np.uint8)
    with pytest.raises(ValueError, match="must be integers"):
        engram_kernel.gather(table, np.zeros(3))
    with pytest.raises(ValueError, match=r"must be \[n\]"):
        engram_kernel.gather(table, np.zeros((3, 1), np.int64))
    with pytest.raises(ValueError, match="files"):
        engram_kernel.read_rows(np.zeros(2, np.int32), np.zeros(3, np.int64), 8)


def test_a_window_and_a_dtype_that_do_not_fit_are_refused() -> None:
    hashes = NgramHashLayout(EngramConfig(vocab_size=9, embedding_table_size=2, layer_ids=[1]))
    plan = NativeKernel()._native(hashes.plan(), True)
    for shape in ((1, 1), (9,), (1, 2, 3)):
        with pytest.raises(ValueError, match="window must be"):
            engram_kernel.hash_window(plan, np.zeros(shape, np.int64))
    for dtype in (np.int16, np.uint8, np.float64):
        with pytest.raises(ValueError, match="int64 or int32"):
            engram_kernel.hash_window(plan, np.zeros((1, 5), np.int64), dtype)


def test_an_output_is_reused(seed: int) -> None:
    layout = NgramHashLayout(EngramConfig(vocab_size=300, embedding_table_size=5000))
    window = layout.window(layout.start(2), torch.randint(0, 300, (2, 50)))
    out = torch.empty(2, 50, layout.config.num_columns, dtype=torch.int32)
    got = NativeKernel().hash_window(window, layout.plan(), True, torch.int32, out)
    assert got.data_ptr() == out.data_ptr()
    assert torch.equal(out.long(), layout.hash_window(window, backend="numpy"))


def test_the_instruction_set_is_known() -> None:
    assert engram_kernel.instruction_set() in {"avx512", "avx2", "baseline"}
