"""`engram size` as a person and a script call it."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner, Result

from engram.cli.main import app
from unit.sizing.samples import CONFIGS, sized

TINY = str(CONFIGS / "granite-4.0-h-tiny.json")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["size", *arguments])


def test_the_json_of_one_rank() -> None:
    result = run("--model", TINY, "--tokens", "1000", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    one = 57_341_952 + 1000 * 8192
    assert report == {
        "architecture": "GraniteMoeHybridForCausalLM",
        "tp": 1,
        "recurrent_layers": 36,
        "attention_layers": 4,
        "conv_dtype": "BF16",
        "state_dtype": "F32",
        "kv_dtype": "BF16",
        "tokens": 1000,
        "state_bytes": 57_341_952,
        "kv_bytes_per_token": 8192,
        "snapshot_bytes": one,
        "snapshot_bytes_all_ranks": one,
        "ram": {"bytes": 10_000_000_000, "snapshots": 10_000_000_000 // one},
        "disk": None,
    }


def test_the_json_of_four_ranks() -> None:
    arguments = ["--tp", "4", "--max-warm-memory-gb", "1", "--snapshot-disk-quota-gb", "10"]
    report = json.loads(run("--model", TINY, "--json", *arguments).stdout)
    size = sized("granite-4.0-h-tiny", 4)
    one = size.snapshot_bytes(8192)
    assert report["state_bytes"] == size.state_bytes == 14_376_960
    assert report["snapshot_bytes"] == one
    assert report["snapshot_bytes_all_ranks"] == 4 * one
    assert report["ram"] == {"bytes": 10**9, "snapshots": 10**9 // one}
    assert report["disk"] == {"bytes": 10**10, "snapshots": 10**10 // (4 * one)}


def test_what_a_person_reads() -> None:
    result = run("--model", TINY, "--tokens", "8192", "--tp", "4", "--conv-dtype", "float32")
    assert result.exit_code == 0
    for part in ("36 recurrent, 4 attention", "window F32, state F32, KV BF16", "of 4 ranks"):
        assert part in result.output
    assert "disk" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "absent"], "absent cannot be read: No such file"),
        (["--model", TINY, "--tp", "5"], "cannot be divided among 5 ranks"),
        (["--model", TINY, "--kv-dtype", "int3"], "one of float32, bfloat16, float16"),
        (["--model", TINY, "--max-warm-memory-gb", "0"], "--max-warm-memory-gb: Input should be"),
        (["--model", TINY, "--max-warm-memory-gb", "1e305"], "--max-warm-memory-gb: Input"),
        (["--model", TINY, "--snapshot-disk-quota-gb", "1e305"], "--snapshot-disk-quota-gb: Input"),
        (["--model", TINY, "--tokens", "0"], "--tokens"),
        (["--model", TINY, "--tokens", "9" * 400], "--tokens"),
    ],
)
def test_what_cannot_be_answered_is_said(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_neither_torch_nor_sglang_is_imported() -> None:
    code = (
        "import sys; from engram.sizing import *; from pathlib import Path;"
        f"size_of(read_config(Path({TINY!r})));"
        "print(sorted({'torch', 'sglang'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
