"""`engram size`: what a model's snapshots cost, from its config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engram.cli.failing import settings_from, told
from engram.sizing import ModelSize, Precision, read_config, size_of

ModelOption = Annotated[
    Path, typer.Option("--model", help="A model directory, or its config.json.")
]
MAX_TOKENS: Final = 2**40
TokensOption = Annotated[
    int, typer.Option("--tokens", min=1, max=MAX_TOKENS, help="Tokens of a snapshot.")
]
RanksOption = Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel ranks.")]
ConvOption = Annotated[
    str | None,
    typer.Option(
        "--conv-dtype", help="Of the convolution's window, SGLANG_MAMBA_CONV_DTYPE. [bfloat16]"
    ),
]
StateOption = Annotated[
    str | None,
    typer.Option(
        "--state-dtype", help="Of the state, SGLANG_MAMBA_SSM_DTYPE. [the model's, or float32]"
    ),
]
KVOption = Annotated[
    str | None,
    typer.Option("--kv-dtype", help="Of the KV cache, --dtype of the server. [the model's]"),
]
WarmOption = Annotated[
    float | None,
    typer.Option("--max-warm-memory-gb", help="The RAM tier of each rank. [the server's default]"),
]
QuotaOption = Annotated[
    float | None, typer.Option("--snapshot-disk-quota-gb", help="The store on disk. [none]")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def size(
    model: ModelOption,
    tokens: TokensOption = 8192,
    tp: RanksOption = 1,
    conv_dtype: ConvOption = None,
    state_dtype: StateOption = None,
    kv_dtype: KVOption = None,
    max_warm_memory_gb: WarmOption = None,
    snapshot_disk_quota_gb: QuotaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say how large a model's snapshots are, and how many of them each tier holds."""
    with told():
        settings = settings_from(
            max_warm_memory_gb=max_warm_memory_gb, snapshot_disk_quota_gb=snapshot_disk_quota_gb
        )
        precision = Precision(conv_dtype, state_dtype, kv_dtype)
        found = size_of(read_config(model), ranks=tp, precision=precision)
        quota = settings.snapshot_disk_quota_gb
        report = _report(
            found, tokens, settings.max_warm_bytes, None if quota is None else int(quota * 1e9)
        )
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(Console(highlight=False, soft_wrap=True), found, tokens, report)


def _report(size: ModelSize, tokens: int, ram: int, disk: int | None) -> dict[str, object]:
    """The JSON object. Bytes are those of one rank where ``all_ranks`` is not in the name."""
    one = size.snapshot_bytes(tokens)
    return {
        "architecture": size.architecture,
        "tp": size.ranks,
        "recurrent_layers": size.recurrent_layers,
        "attention_layers": size.attention_layers,
        "conv_dtype": size.conv_dtype,
        "state_dtype": size.state_dtype,
        "kv_dtype": size.kv_dtype,
        "tokens": tokens,
        "state_bytes": size.state_bytes,
        "kv_bytes_per_token": size.kv_bytes_per_token,
        "snapshot_bytes": one,
        "snapshot_bytes_all_ranks": one * size.ranks,
        # The RAM tier is each rank's own, the disk is all ranks'.
        "ram": {"bytes": ram, "snapshots": size.capacity(ram, tokens)},
        "disk": None
        if disk is None
        else {"bytes": disk, "snapshots": size.capacity(disk // size.ranks, tokens)},
    }


def _show(console: Console, size: ModelSize, tokens: int, report: dict[str, object]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    rank = "" if size.ranks == 1 else f", one of {size.ranks} ranks"
    rows = [
        ("model", "", escape(size.architecture)),
        ("layers", "", f"{size.recurrent_layers} recurrent, {size.attention_layers} attention"),
        ("", "", f"window {size.conv_dtype}, state {size.state_dtype}, KV {size.kv_dtype}"),
        (f"one state{rank}", shown(size.state_bytes), f"{size.state_bytes:,} bytes; one a turn"),
        ("KV of a token", shown(size.kv_bytes_per_token), f"{size.kv_bytes_per_token:,} bytes"),
        (
            f"a snapshot of {tokens:,} tokens",
            shown(size.snapshot_bytes(tokens)),
            "one state and all KV",
        ),
    ]
    if size.ranks > 1:
        rows.append(("", shown(size.snapshot_bytes(tokens) * size.ranks), "all ranks together"))
    for tier, name in (("ram", "RAM tier of a rank"), ("disk", "disk")):
        room = report[tier]
        if isinstance(room, dict):
            rows.append(
                (name, shown(room["bytes"]), f"{room['snapshots']:,} such snapshots, none shared")
            )
    for name, value, note in rows:
        table.add_row(f"[bold]{name}[/]", value, note)
    console.print(table)


def shown(count: int) -> str:
    """Bytes for people, in powers of 1024."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} GiB"
