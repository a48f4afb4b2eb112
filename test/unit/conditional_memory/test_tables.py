"""Every home gives the same rows; disk tables are whole, resumable and checked."""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from engram.conditional_memory import (
    DiskTable,
    EngramConfig,
    EngramModule,
    HostTable,
    MemoryTable,
    NgramHashLayout,
    Prefetcher,
    RowFormat,
    TorchTable,
    kernel,
)
from engram.conditional_memory.tables import create
from engram.conditional_memory.tables.format import HEADER, digest_path, shard_path
from engram.conditional_memory.tables.rows import decode_fp8, encode_fp8
from engram.errors import (
    AlreadyExistsError,
    InvalidRequestError,
    SegmentCorruptError,
    StoreBusyError,
    StoreError,
    StoreFormatError,
)

ROWS, DIM = 1000, 40
HOMES = ["memory", "host", "mmap", "direct", "cached", "sharded"]


@pytest.fixture(params=[True, False], ids=["kernel", "torch"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With and without the native kernel."""
    if not request.param:
        monkeypatch.setattr(kernel, "load", lambda: None)
    elif kernel.load() is None:
        pytest.skip("engram_kernel is not installed")
    return request.param


def disk(folder: Path, values: torch.Tensor, dtype: str, **options: object) -> DiskTable:
    raw = RowFormat.parse(dtype).encode(values)
    return DiskTable.create(
        folder, len(values), values.shape[1], dtype, lambda a, b: raw[a:b], **options
    )


def open_home(home: str, folder: Path, values: torch.Tensor, dtype: str) -> MemoryTable:
    if home == "memory":
        return TorchTable(*values.shape, dtype, weight=values)
    if home == "host":
        table = HostTable(*values.shape, dtype)
        table.write(0, values[:300])
        table.write(300, values[300:])
        return table
    if home == "sharded":
        return disk(folder, values, dtype, shard_rows=333, reads="direct", threads=3)
    if home == "cached":
        return disk(folder, values, dtype, reads="direct", cache_bytes=30_000)
    return disk(folder, values, dtype, reads=home)


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_homes_agree(home: str, dtype: str, native: bool, tmp_path: Path, seed: int) -> None:
    values = torch.randn(ROWS, DIM) * torch.rand(ROWS, 1).mul(20).exp2()
    table = open_home(home, tmp_path / "table", values, dtype)
    rows = RowFormat.parse(dtype)
    expected = rows.decode(rows.encode(values), DIM)
    assert table.dtype == expected.dtype
    for shape in ((), (0,), (7,), (3, 50), (2, 5, 24)):
        ids = torch.randint(0, ROWS, shape)
        got = table.gather(ids)
        assert got.shape == (*shape, DIM)
        assert torch.equal(got, expected[ids])
        assert torch.equal(table.gather(ids.int()), got)
    assert torch.equal(table.gather(torch.arange(ROWS)), expected)
    for wrong in (-1, ROWS):
        with pytest.raises(InvalidRequestError, match=f"row {wrong} is outside"):
            table.gather(torch.tensor([0, wrong]))
    table.close()


@pytest.mark.parametrize("home", HOMES)
def test_a_module_takes_every_home(home: str, native: bool, tmp_path: Path, seed: int) -> None:
    config = EngramConfig(
        vocab_size=90,
        embedding_table_size=100,
        num_hash_heads=2,
        embedding_dim=8,
        hidden_dim=6,
        layer_ids=[4],
    )
    trained = EngramModule(config)
    table = open_home(home, tmp_path / "t", trained.table.weight.detach(), "fp32")
    served = EngramModule(config, table=table)
    served.load_state_dict(trained.state_dict(), strict=False)
    ids = torch.randint(0, 90, (3, 50))
    hidden = torch.randn(3, 50, 6)
    expected = trained(hidden, ids)[0]
    assert torch.equal(served(hidden, ids)[0], expected)
    handle = served.prefetch_embeddings(ids)
    assert torch.equal(served(hidden, memory_embeddings=handle)[0], expected)


@pytest.mark.parametrize("home", HOMES)
def test_a_copied_module_shares_what_cannot_be_copied(home: str, tmp_path: Path) -> None:
    config = EngramConfig(
        vocab_size=90, embedding_table_size=500, num_hash_heads=1, embedding_dim=8, hidden_dim=6
    )
    weight = EngramModule(config).table.weight.detach()
    with open_home(home, tmp_path / "t", weight, "fp32") as table:
        module = EngramModule(config, table=table)
        module.prefetcher = Prefetcher(1)
        copied = copy.deepcopy(module)
        assert (copied.table is table) == (home != "memory")
        ids, hidden = torch.randint(0, 90, (2, 9)), torch.randn(2, 9, 6)
        handle = copied.prefetch_embeddings(ids)
        got = copied(hidden, memory_embeddings=handle)[0]
        assert torch.equal(got, module(hidden, ids)[0])
        module.prefetcher.close()


class TestFp8:
    def test_v41s_row(self) -> None:
        assert RowFormat.FP8.row_bytes(256) == 264

    def test_error_is_that_of_three_mantissa_bits(self, seed: int) -> None:
        values = torch.randn(64, 96) * torch.randn(64, 1).mul(8).exp2()
        decoded = decode_fp8(*encode_fp8(values)).float()
        largest = values.view(64, 3, 32).abs().amax(-1).repeat_interleave(32, dim=1)
        # Half a step of the number itself, or of the smallest number its block can have.
        bound = (values.abs() / 16).maximum(largest * 2.0**-16)
        assert bool(((decoded - values).abs() <= bound).all())

    def test_decoding_is_number_times_power(self, seed: int) -> None:
        numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
        numbers = numbers[numbers.float().isfinite()][None, :224].contiguous()
        exponents = torch.tensor([[0, 1, 90, 127, 128, 150, 200]], dtype=torch.uint8)
        got = decode_fp8(numbers, exponents).double()
        powers = torch.exp2(exponents.double() - 127).repeat_interleave(32, dim=1)
        assert torch.equal(got, (numbers.double() * powers).to(torch.bfloat16).double())

    def test_sglang_reads_the_same_numbers(self, seed: int) -> None:
        values = torch.randn(50, 256)
        numbers, exponents = encode_fp8(values)
        # As `EngramEmbedding._owned_rows` of SGLang computes them.
        scale = exponents.view(torch.float8_e8m0fnu).float()
        rows = numbers.float().unflatten(-1, (-1, 32)) * scale.unsqueeze(-1)
        assert torch.equal(decode_fp8(numbers, exponents), rows.flatten(-2).to(torch.bfloat16))

    def test_zeros_and_the_largest(self) -> None:
        values = torch.tensor([[0.0] * 32, [3e38] * 32, [1e-38] * 32])
        decoded = decode_fp8(*encode_fp8(values)).float()
        assert decoded[0].tolist() == [0.0] * 32
        torch.testing.assert_close(decoded[1:], values[1:], rtol=1 / 16, atol=0)

    @pytest.mark.parametrize("exponent", [0, 1, 127, 254, 255])
    def test_every_number_is_sglangs(self, exponent: int) -> None:
        """All 256 numbers, NaN among them, with the exponents at the ends; 255 is NaN."""
        numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(8, 32)
        exponents = torch.full((8, 1), exponent, dtype=torch.uint8)
        scale = exponents.view(torch.float8_e8m0fnu).float()
        expected = (numbers.float() * scale).to(torch.bfloat16)
        got = decode_fp8(numbers, exponents)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        assert not torch.isfinite(got).any() or exponent < 255

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 1e39])
    def test_what_is_not_finite_is_refused(self, wrong: float) -> None:
        """It would have taken the other 31 numbers of its block along."""
        values = torch.ones(2, 64, dtype=torch.float64)
        values[1, 40] = wrong
        with pytest.raises(InvalidRequestError, match="must be finite"):
            RowFormat.FP8.encode(values)

    def test_the_largest_stay_finite(self) -> None:
        largest = torch.finfo(torch.float32).max
        values = torch.tensor([[largest, -largest] + [1.0] * 30])
        decoded = decode_fp8(*encode_fp8(values)).float()
        assert decoded[0, :2].tolist() == [240 * 2.0**120, -240 * 2.0**120]

    def test_what_the_format_has_comes_back(self, seed: int) -> None:
        """Exponents are the smallest: every number is already one that the format has."""
        numbers = torch.randint(0, 127, (254, 32), dtype=torch.uint8)
        numbers[:, 7] = 126  # 448, which only the own exponent of its block can hold
        exponents = torch.arange(1, 248, dtype=torch.uint8)[:, None]
        numbers = numbers[:247].view(torch.float8_e4m3fn)
        exponents[246] = 246
        values = numbers.float() * torch.exp2(exponents.double() - 127).float()
        again, powers = encode_fp8(values)
        assert torch.equal(powers, exponents)
        assert torch.equal(again.view(torch.uint8), numbers.view(torch.uint8))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_a_cast_model_keeps_them(self, dtype: torch.dtype, seed: int) -> None:
        table = TorchTable(50, 40, "fp8")
        ids = torch.randint(0, 50, (2, 9))
        expected = table.gather(ids)
        assert torch.equal(torch.nn.ModuleList([table]).to(dtype)[0].gather(ids), expected)
        assert table.weight.dtype == torch.float8_e4m3fn


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"must be \(10, 4\), not \(5, 4\)"):
        TorchTable(10, 4, weight=torch.zeros(5, 4))


def test_more_rows_than_int32_in_memory(native: bool) -> None:
    """Only the pages that are touched take memory."""
    rows = (1 << 31) + 100
    table = HostTable(rows, 1, "bf16", huge_pages=False)
    far = torch.tensor([5, (1 << 31) - 1, 1 << 31, rows - 1])
    for row in far.tolist():
        table.write(row, torch.tensor([[float(row % 1000)]]))
    expected = (far % 1000).to(torch.bfloat16)[:, None]
    assert torch.equal(table.gather(far), expected)
    assert table.gather(torch.tensor([6, 1 << 30])).tolist() == [[0], [0]]


@pytest.mark.parametrize("reads", ["mmap", "direct"])
def test_more_rows_than_int32_on_disk(
    reads: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with holes, whose digest is not computed: opening does not read it."""
    rows = (1 << 31) + 5000
    header = create.TableHeader(rows, 1, "bf16", rows, ("0" * 64,))
    (tmp_path / HEADER).write_bytes(header.encode())
    far = [3, (1 << 31) - 1, 1 << 31, rows - 1]
    with shard_path(tmp_path, 0).open("wb") as file:
        file.truncate(header.shard_bytes(0))
        for row in far:
            file.seek(row * 2)
            file.write(RowFormat.BF16.encode(torch.tensor([[float(row % 100)]])).tobytes())
    with DiskTable(tmp_path, reads=reads) as table:
        expected = torch.tensor(far).remainder(100).to(torch.bfloat16)[:, None]
        assert torch.equal(table.gather(torch.tensor(far)), expected)


class TestCreation:
    def values(self) -> torch.Tensor:
        return torch.arange(ROWS * DIM, dtype=torch.float32).view(ROWS, DIM)

    @pytest.mark.parametrize("fail_at", [0, 250, 600, 999])
    def test_it_goes_on_where_it_stopped(self, fail_at: int, tmp_path: Path) -> None:
        values = self.values()
        seen: list[int] = []
        failing = True

        def fill(start: int, end: int) -> np.ndarray:
            if failing and end > fail_at:
                raise KeyboardInterrupt
            seen.append(start)
            return RowFormat.FP32.encode(values[start:end])

        def make() -> DiskTable:
            return DiskTable.create(tmp_path / "t", ROWS, DIM, "fp32", fill, shard_rows=200)

        with pytest.raises(KeyboardInterrupt):
            make()
        with pytest.raises(InvalidRequestError, match="no finished table"):
            DiskTable(tmp_path / "t")
        failing = False
        table = make()
        assert seen == [0, 200, 400, 600, 800], "each shard is written once"
        assert torch.equal(table.gather(torch.arange(ROWS)), values)
        table.verify()
        names = {path.name for path in (tmp_path / "t").iterdir()}
        assert names == {HEADER, *(f"rows-{i:05d}.bin" for i in range(5))}

    def test_progress_is_told(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        told: list[tuple[int, int]] = []
        raw = RowFormat.FP32.encode(self.values())
        DiskTable.create(
            tmp_path / "a",
            ROWS,
            DIM,
            "fp32",
            lambda a, b: raw[a:b],
            shard_rows=400,
            progress=lambda done, rows: told.append((done, rows)),
        )
        assert told == [(400, ROWS), (800, ROWS), (1000, ROWS)]
        DiskTable.create(tmp_path / "b", 3, 4, "bf16", lambda a, b: None, progress=True)
        assert "writing table" in capsys.readouterr().out

    def test_blocks_are_small_and_zeros_may_be_left_out(self, tmp_path: Path) -> None:
        spans: list[int] = []

        def fill(start: int, end: int) -> None:
            spans.append(end - start)

        table = DiskTable.create(tmp_path / "t", 3000, 2048, "fp32", fill)
        assert max(spans) * 2048 * 4 <= 8 << 20
        assert sum(spans) == 3000
        assert not table.gather(torch.tensor([0, 2999])).any()

    def test_another_table_is_not_gone_on_with(self, tmp_path: Path) -> None:
        def stop(start: int, end: int) -> np.ndarray:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            DiskTable.create(tmp_path, ROWS, DIM, "fp32", stop)
        with pytest.raises(InvalidRequestError, match="the beginning of another table"):
            DiskTable.create(tmp_path, ROWS, DIM, "bf16", stop)

    def test_a_finished_table_is_not_overwritten(self, tmp_path: Path) -> None:
        disk(tmp_path, self.values(), "fp32")
        with pytest.raises(AlreadyExistsError):
            disk(tmp_path, self.values(), "fp32")

    def test_blocks_of_another_shape_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequestError, match="must come as uint8"):
            DiskTable.create(tmp_path, 10, 4, "fp32", lambda a, b: np.zeros((3, 16), np.uint8))

    @pytest.mark.parametrize("shard_rows", [0, -5])
    def test_shards_have_rows(self, shard_rows: int, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequestError, match="at least 1"):
            disk(tmp_path, self.values(), "fp32", shard_rows=shard_rows)

    def test_one_call_writes_at_a_time(self, tmp_path: Path) -> None:
        """A second one would mix its shards with the digests of the first."""
        ones, twos = (torch.full((4, 4), value) for value in (1.0, 2.0))

        def fill(start: int, end: int) -> np.ndarray:
            with pytest.raises(StoreBusyError, match="another call writes"):
                disk(tmp_path, twos, "fp32", shard_rows=2)
            return RowFormat.FP32.encode(ones[start:end])

        table = DiskTable.create(tmp_path, 4, 4, "fp32", fill, shard_rows=2)
        assert torch.equal(table.gather(torch.arange(4)), ones)
        table.verify()

    @pytest.mark.parametrize("damage", ["shard cut", "shard gone", "digest cut"])
    def test_a_damaged_beginning_is_written_again(self, damage: str, tmp_path: Path) -> None:
        values = self.values()
        stop = True

        def fill(start: int, end: int) -> np.ndarray:
            if stop and start >= 500:
                raise KeyboardInterrupt
            return RowFormat.FP32.encode(values[start:end])

        with pytest.raises(KeyboardInterrupt):
            DiskTable.create(tmp_path, ROWS, DIM, "fp32", fill, shard_rows=500)
        if damage == "shard gone":
            shard_path(tmp_path, 0).unlink()
        else:
            path = (shard_path if damage == "shard cut" else digest_path)(tmp_path, 0)
            path.write_bytes(path.read_bytes()[:60])
        stop = False
        table = DiskTable.create(tmp_path, ROWS, DIM, "fp32", fill, shard_rows=500)
        assert torch.equal(table.gather(torch.arange(ROWS)), values)
        table.verify()

    def test_a_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(StoreError, match="file"):
            disk(tmp_path / "file" / "table", self.values(), "fp32")

    @pytest.mark.parametrize("rows", [ROWS - 1, ROWS + 1])
    def test_host_memory_is_filled_by_all_rows(self, rows: int, tmp_path: Path) -> None:
        source = disk(tmp_path, self.values(), "fp32")
        with pytest.raises(InvalidRequestError, match="rows"):
            HostTable(rows, DIM).fill(source.blocks(50_000))

    @pytest.mark.parametrize(
        "raw", [np.ones((2, 1), np.uint8), np.ones((2, 160)), np.ones(160, np.uint8)]
    )
    def test_host_memory_takes_whole_rows(self, raw: np.ndarray) -> None:
        with pytest.raises(InvalidRequestError, match="must be uint8"):
            HostTable(ROWS, DIM).write_raw(0, raw)

    def test_it_can_be_read_into_host_memory(self, tmp_path: Path) -> None:
        source = disk(tmp_path, self.values(), "fp8", shard_rows=300)
        table = HostTable(ROWS, DIM, "fp8")
        table.fill(source.blocks(5000))
        ids = torch.randint(0, ROWS, (100,))
        assert torch.equal(table.gather(ids), source.gather(ids))


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        disk(tmp_path, torch.ones(ROWS, DIM), "fp32", shard_rows=500).close()
        return tmp_path

    def test_a_flipped_bit_is_found(self, folder: Path) -> None:
        path = shard_path(folder, 1)
        data = bytearray(path.read_bytes())
        data[777] ^= 4
        path.write_bytes(data)
        with DiskTable(folder) as table, pytest.raises(SegmentCorruptError, match="rows-00001"):
            table.verify()

    def test_a_short_shard_is_found_at_once(self, folder: Path) -> None:
        with shard_path(folder, 0).open("r+b") as file:
            file.truncate(4096)
        with pytest.raises(SegmentCorruptError, match="has 4096 bytes"):
            DiskTable(folder)

    def test_a_missing_shard_is_named(self, folder: Path) -> None:
        shard_path(folder, 1).unlink()
        with pytest.raises(StoreError, match="rows-00001"):
            DiskTable(folder)

    def test_a_shard_that_goes_while_open(self, folder: Path) -> None:
        with DiskTable(folder) as table:
            shard_path(folder, 1).unlink()
            with pytest.raises(StoreError, match="rows-00001"):
                table.verify()

    def test_a_shard_cut_while_open(self, folder: Path, native: bool) -> None:
        table = DiskTable(folder, reads="direct")
        with shard_path(folder, 1).open("r+b") as file:
            file.truncate(0)
        with pytest.raises(StoreError, match="cannot read rows"):
            table.gather(torch.tensor([ROWS - 1]))

    @pytest.mark.parametrize(
        ("old", "new", "error"),
        [
            ('"version": 1', '"version": 2', StoreFormatError),
            ('"rows": 1000', '"rows": 100', InvalidRequestError),
            ('"rows": 1000', '"rows": true', InvalidRequestError),
            ('"rows": 1000', '"rows": 1000, "more": 1', InvalidRequestError),
            ('"dtype": "fp32"', '"dtype": "int4"', InvalidRequestError),
            ('"engram-table"', '"other"', InvalidRequestError),
            ("{", "[", InvalidRequestError),
            ("{", "[" * 100_000, InvalidRequestError),
            ("{", "\udcff", InvalidRequestError),
        ],
    )
    def test_a_header_that_is_not_right(
        self, folder: Path, old: str, new: str, error: type[Exception]
    ) -> None:
        header = (folder / HEADER).read_text()
        assert old in header
        changed = header.replace(old, new, 1)
        (folder / HEADER).write_text(changed, errors="surrogateescape")
        with pytest.raises(error):
            DiskTable(folder)

    def test_a_header_that_is_no_file(self, folder: Path) -> None:
        (folder / HEADER).unlink()
        (folder / HEADER).mkdir()
        with pytest.raises(StoreError, match=r"cannot read .*table\.json"):
            DiskTable(folder)


@pytest.mark.parametrize("home", [home for home in HOMES if home != "memory"])
def test_a_closed_table_gives_no_rows(home: str, native: bool, tmp_path: Path) -> None:
    """Its memory is gone, and what was its file may be another one now."""
    layout = NgramHashLayout(EngramConfig(vocab_size=9, embedding_table_size=3, num_hash_heads=1))
    rows = layout.rows()
    table = open_home(home, tmp_path / "t", torch.ones(max(rows, 400), DIM), "fp32")
    table.close()
    table.close()
    taken = [os.open("/dev/zero", os.O_RDONLY) for _ in range(10)]
    with pytest.raises(InvalidRequestError, match="is closed"):
        table.gather(torch.tensor([1]))
    window = layout.window(layout.start(1), torch.tensor([[1]]))
    with pytest.raises(InvalidRequestError, match="is closed"):
        table.lookup(layout, window)
    for file in taken:
        os.close(file)


def test_an_unknown_way_to_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="there are: mmap, direct"):
        disk(tmp_path, torch.ones(5, DIM), "fp32", reads="fast")


def test_what_cannot_be_opened_leaves_no_files_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    disk(tmp_path, torch.ones(5, DIM), "fp32").close()
    for _ in range(3):
        with pytest.raises(InvalidRequestError, match="holds no rows"):
            DiskTable(tmp_path, cache_bytes=1)
    assert len(os.listdir("/proc/self/fd")) == before


class TestCache:
    @pytest.fixture
    def table(self, tmp_path: Path) -> Iterator[DiskTable]:
        values = torch.arange(ROWS, dtype=torch.float32)[:, None].expand(ROWS, DIM)
        with disk(tmp_path, values.contiguous(), "fp32", cache_bytes=160 * 64) as table:
            yield table

    def test_repeated_rows_are_read_once(self, table: DiskTable) -> None:
        for _ in range(5):
            table.gather(torch.arange(10).repeat(3))
        statistics = table.cache_statistics
        assert statistics is not None
        assert (statistics.hits, statistics.misses) == (
            40 - statistics.misses + 10,
            statistics.misses,
        )
        assert statistics.hit_ratio > 0.5
        assert table.statistics.requested == 150
        assert table.statistics.read == 50
        assert table.statistics.dedup_ratio == 3.0

    def test_a_scan_does_not_push_out_hot_rows(self, table: DiskTable, seed: int) -> None:
        hot = torch.arange(0, 40, 2)
        for _ in range(20):
            table.gather(hot)
        table.gather(torch.arange(100, ROWS))
        before = table.cache_statistics.hits
        table.gather(hot)
        held = table.cache_statistics.hits - before
        assert held >= 18, f"{held} of 20 hot rows survived a scan over 900"

    def test_a_full_cache_admits_no_row_that_comes_once(self, table: DiskTable) -> None:
        # Twice what it holds, often enough to count, not so often that the counts are halved.
        for _ in range(4):
            table.gather(torch.arange(128))
        tags = table._cache._tags
        assert (tags >= 0).all()
        before = table.cache_statistics.admitted
        for part in torch.arange(200, ROWS)[:160].split(8):
            table.gather(part)
        admitted = table.cache_statistics.admitted - before
        # Some pass for frequent: the sketch of so small a cache has 256 counters for 288 ids.
        assert admitted < 60, f"{admitted} of 160 rows that came once were admitted"

    def test_hot_rows_change(self, table: DiskTable) -> None:
        """What was hot is forgotten when it is no longer asked for."""
        old, new = torch.arange(0, 50), torch.arange(500, 550)
        for ids in (old, new):
            for _ in range(60):
                table.gather(ids)
        before = table.cache_statistics.hits
        table.gather(new)
        assert table.cache_statistics.hits - before >= 40

    def test_it_stays_within_its_bytes(self, table: DiskTable, seed: int) -> None:
        cache = table._cache
        assert cache.capacity * table.row_bytes <= 160 * 64
        for _ in range(50):
            table.gather(torch.randint(0, ROWS, (200,)))
        tags = cache._tags[cache._tags >= 0]
        assert len(np.unique(tags)) == len(tags) <= cache.capacity
        assert cache.statistics.admitted - cache.statistics.evicted == len(tags)

    def test_threads_get_right_rows(self, table: DiskTable, seed: int) -> None:
        wrong: list[torch.Tensor] = []

        def work(seed: int) -> None:
            random = torch.Generator().manual_seed(seed)
            for _ in range(100):
                ids = torch.randint(0, ROWS, (64,), generator=random) ** 2 // ROWS
                got = table.gather(ids)[:, 0]
                if not torch.equal(got, ids.float()):
                    wrong.append(ids)

        threads = [Thread(target=work, args=(seed + i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_a_cache_too_small_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequestError, match="holds no rows"):
            disk(tmp_path / "x", torch.ones(5, DIM), "fp32", cache_bytes=100)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="there are: fp32, bf16, fp8"):
        TorchTable(3, 4, "int4")
