"""Lookups run beside the caller, in order, and bring their errors along."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from engram import EngramConfig, EngramModule
from engram.conditional_memory import DiskTable, Prefetcher, RowFormat, TorchTable
from engram.errors import DeadlineError, InvalidRequestError


def config(**fields: object) -> EngramConfig:
    values: dict = {
        "vocab_size": 50,
        "embedding_table_size": 60,
        "num_hash_heads": 2,
        "embedding_dim": 4,
        "hidden_dim": 6,
        "layer_ids": (1,),
    }
    return EngramConfig(**{**values, **fields})


class GatedTable(TorchTable):
    """A table whose reads wait until they are let through."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__(rows, dim)
        self.started = threading.Event()
        self.let_through = threading.Event()

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        self.started.set()
        assert self.let_through.wait(60)
        return super().gather(ids)


def gated() -> tuple[EngramModule, GatedTable]:
    rows = EngramModule(config()).table.rows
    table = GatedTable(rows, 4)
    return EngramModule(config(), table=table), table


def test_the_caller_goes_on_while_rows_are_read(seed: int) -> None:
    module, table = gated()
    ids = torch.randint(0, 50, (2, 9))
    handle = module.prefetch_embeddings(ids)
    assert table.started.wait(60)
    # The read is under way and cannot end; the caller is here all the same.
    assert not handle.done()
    with pytest.raises(DeadlineError, match="did not arrive"):
        handle.result(timeout=0.01)
    table.let_through.set()
    rows = handle.result()
    assert torch.equal(rows, table.weight[module.layout.hash(ids)].flatten(-2))
    assert handle.result() is rows


def test_decode_fetches_the_next_step_while_this_one_computes(seed: int) -> None:
    """The token of step t + 1 is given out before step t is computed, and nothing changes."""
    module, table = gated()
    table.let_through.set()
    hidden = torch.randn(2, 6, 6)
    ids = torch.randint(0, 50, (2, 6))
    whole = module(hidden, ids)[0]
    state = module.new_state(2)
    ahead = module.prefetch_embeddings(ids[:, :1], state=state)
    steps = []
    for t in range(6):
        handle = ahead
        if t < 5:
            table.started.clear()
            ahead = module.prefetch_embeddings(ids[:, t + 1 : t + 2], state=state)
            assert table.started.wait(60)
        steps.append(module(hidden[:, t : t + 1], memory_embeddings=handle, state=state)[0])
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)


def test_the_ids_may_be_changed_after_the_call(seed: int) -> None:
    module, table = gated()
    ids = torch.randint(0, 50, (1, 5))
    expected = table.weight[module.layout.hash(ids)].flatten(-2)
    handle = module.prefetch_embeddings(ids)
    ids.zero_()
    table.let_through.set()
    assert torch.equal(handle.result(), expected)


def test_a_closed_prefetcher_and_one_without_threads_are_refused() -> None:
    prefetcher = Prefetcher(1)
    late = prefetcher.submit(lambda: torch.ones(1))
    prefetcher.close()
    prefetcher.close()
    assert late.result().item() == 1
    with pytest.raises(InvalidRequestError, match="prefetcher is closed"):
        prefetcher.submit(lambda: torch.ones(1))
    with pytest.raises(InvalidRequestError, match="at least one thread"):
        Prefetcher(0)


def test_a_forked_process_prefetches_too() -> None:
    """Its parent's threads are not in it: a lookup would have waited for them without end."""
    source = """
import os, sys, threading
import torch
from engram.conditional_memory import Prefetcher
from engram.conditional_memory.prefetch import shared_prefetcher
from engram.errors import InvalidRequestError

own, shared = Prefetcher(1), shared_prefetcher()
let_through = threading.Event()
waiting = [p.submit(lambda: torch.ones(3) if let_through.wait(60) else None) for p in (own, shared)]
shared.submit(lambda: torch.ones(3)).result(60)
child = os.fork()
if child == 0:
    good = all(p.submit(lambda: torch.ones(3)).result(60).sum() == 3 for p in (own, shared))
    try:
        waiting[0].result(60)
        good = False
    except InvalidRequestError as error:
        good = good and "forked" in str(error)
    os._exit(0 if good else 1)
let_through.set()
assert all(handle.result(60).sum() == 3 for handle in waiting)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_errors_come_with_the_result() -> None:
    def fail() -> torch.Tensor:
        raise InvalidRequestError("no such row")

    prefetcher = Prefetcher(1)
    handle = prefetcher.submit(fail)
    with pytest.raises(InvalidRequestError, match="no such row"):
        handle.result()
    # The thread is still there for others.
    assert prefetcher.submit(lambda: torch.ones(1)).result().item() == 1
    prefetcher.close()


def test_an_error_that_is_a_timeout_is_not_mistaken_for_lateness() -> None:
    def fail() -> torch.Tensor:
        raise TimeoutError("of the disk")

    prefetcher = Prefetcher(1)
    with pytest.raises(TimeoutError, match="of the disk"):
        prefetcher.submit(fail).result(timeout=60)
    prefetcher.close()


def test_many_modules_share_threads(tmp_path: Path, seed: int) -> None:
    """Two layers, tables on disk with caches, many steps under way at once."""
    layers = []
    for layer in (1, 2):
        made = config(layer_ids=(1, 2), layer_id=layer)
        rows = EngramModule(made).table.rows
        values = RowFormat.FP32.encode(torch.randn(rows, 4))
        table = DiskTable.create(
            tmp_path / str(layer),
            rows,
            4,
            "fp32",
            lambda a, b, values=values: np.asarray(values[a:b]),
            reads="direct",
            cache_bytes=1000,
        )
        layers.append(EngramModule(made, table=table))
        layers[-1].prefetcher = layers[0].prefetcher or Prefetcher(3)
    batches = [torch.randint(0, 50, (2, 7)) for _ in range(40)]
    handles = [[module.prefetch_embeddings(ids) for module in layers] for ids in batches]
    for ids, pair in zip(batches, handles, strict=True):
        for module, handle in zip(layers, pair, strict=True):
            expected = module.table.gather(module.layout.hash(ids, module.config.layer_id))
            assert torch.equal(handle.result(), expected.flatten(-2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_reach_a_gpu_on_a_stream_of_their_own(seed: int) -> None:
    module = EngramModule(config()).cuda()
    module.table.cpu()
    ids = torch.randint(0, 50, (2, 9))
    hidden = torch.randn(2, 9, 6, device="cuda")
    with torch.no_grad():
        expected = module(hidden, ids)[0]
        handle = module.prefetch_embeddings(ids)
        assert handle.result().is_cuda
        torch.testing.assert_close(module(hidden, memory_embeddings=handle)[0], expected)
