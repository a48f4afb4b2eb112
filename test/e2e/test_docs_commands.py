"""The commands of the documents that need a server, run one after another against one."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engram.testing.server import ServerProcess
from fences import Block, blocks
from repository import ROOT

BIN = Path(sys.executable).parent
API = (ROOT / "docs" / "http-api.md").read_text()
OURS = {"success", "error", "message", "hint", "details"}  # described in prose


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("docs")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    """The server of README: its model made, its launch command, but a free port."""
    (make_model,), (launch,) = blocks("make-model"), blocks("launch")
    made = run(make_model, folder)
    assert made.returncode == 0, made.stdout + made.stderr
    words = shlex.split(launch.code.replace("\\\n", " "))[3:]
    options = dict(zip(words, [*words[1:], ""], strict=True))
    flags = [w for w in words if w not in ("--model-path", "--port", "--snapshot-dir")]
    for option in ("--model-path", "--port", "--snapshot-dir"):
        flags.remove(options[option])
    store = str(folder / options["--snapshot-dir"])
    with ServerProcess(
        folder / options["--model-path"],
        [*flags, "--snapshot-dir", store],
        log_path=folder / "server.log",
    ) as running:
        yield running


def run(
    block: Block, folder: Path, server: ServerProcess | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a block as a reader would, in the folder where the model was made."""
    code = block.code
    if server is not None:
        code = code.replace("localhost:30000", f"127.0.0.1:{server.port}")
    command = {
        "bash": ["bash", "-euo", "pipefail", "-c", code],
        "python": [sys.executable, "-c", code],
    }[block.language]
    return subprocess.run(
        command,
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            **({} if server is None else {"ENGRAM_URL": server.url}),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )


def json_values(text: str) -> list[dict[str, object]]:
    """The JSON objects in the output of a block, which curl prints one behind another."""
    decoder, found = json.JSONDecoder(), []
    position = text.find("{")
    while position >= 0:
        value, end = decoder.raw_decode(text, position)
        found.append(value)
        position = text.find("{", end)
    return found


def undocumented(reply: dict[str, object]) -> set[str]:
    """The keys of a reply of Engram's, and of the metadata in it, that the HTTP page lacks."""
    documented = set(re.findall(r"`(\w+)`", API)) | OURS
    keys = set(reply)
    listed = reply.get("snapshots")
    for inner in (reply.get("metadata"), *(listed if isinstance(listed, list) else ())):
        keys |= set(inner or ())  # type: ignore[call-overload]
    return keys - documented


@pytest.mark.skipif(shutil.which("curl") is None, reason="the documents use curl")
@pytest.mark.timeout(900)
def test_the_commands_of_the_documents(server: ServerProcess, folder: Path) -> None:
    routes = set()
    for block in blocks("server"):
        result = run(block, folder, server)
        assert result.returncode == 0, f"{block}\n{result.stdout}{result.stderr}"
        assert result.stdout
        if not re.search("^curl ", block.code, re.MULTILINE):
            # It may print what the model says, and that anything, a brace too.
            continue
        routes |= set(re.findall(r"localhost:30000(/\w+)", block.code))
        for reply in json_values(result.stdout):
            if "success" in reply:
                # What curl is not told to take for a failure shows how one looks.
                assert reply["success"] is ("--fail-with-body" in block.code), block
                assert undocumented(reply) == set(), block
    assert {
        "/save_snapshot",
        "/restore_snapshot",
        "/list_snapshots",
        "/get_snapshot_info",
        "/delete_snapshot",
    } <= routes


def test_an_undocumented_key_is_seen() -> None:
    assert undocumented({"success": True, "surprise": 1, "token_count": 2}) == {"surprise"}
    assert undocumented({"metadata": {"tier": "ram", "surprise": 1}}) == {"surprise"}
    assert undocumented({"snapshots": [{"surprise": 1}]}) == {"surprise"}
    assert json_values('{"a": 1}{"b": {}}\n') == [{"a": 1}, {"b": {}}]
