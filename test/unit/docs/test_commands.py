"""Every command in the documents is run by a test, or has its reason not to be."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from engram.testing.demo import FLAGS
from fences import Block, blocks, blocks_of

MARKS = {"test", "server", "launch", "make-model", "agents", "agent-tools"}
SHELL = {"bash", "sh", "shell", "console", "python"}
# First line of a block that no test runs -> why.
NOT_RUN = {
    "git clone <address of this repository> engram && cd engram": "the demo has its own test",
    "scripts/test": "it would run itself",
    'pip install -e "python/"': "the tests run in what it made",
    "import json": "unit/upkeep/test_transfer.py runs it",
    "python -m sglang.launch_server --model-path tiny-model --enable-snapshot-persistence "
    "--snapshot-dir ./snapshots \\": "e2e/test_encryption.py launches so",
    "python -m sglang.launch_server --model-path <model> --enable-snapshot-persistence "
    "--snapshot-dir ./snapshots \\": "e2e/agents_world.py launches so",
    "engram agents rekey --dir ./snapshots --old old-key.txt --new new-key.txt": (
        "e2e/test_agents.py runs it"
    ),
    "engram key new new.key": "unit/cli/test_keys.py rotates; here is no store",
    "python -m pytest test/faults/test_hostile_files.py -s": "the unit tests run a part of it",
    "PYTHONPATH=python:test python -m faults.hostile --seed 20261122 --case 4711": "the same",
    "from engram import Engine": "e2e/test_openai_clients.py runs one; here a server has the store",
    "import torch": "unit/conditional_memory/test_document.py runs it",
    "state = memory.new_state(batch_size=1)": "the same test goes on with it",
}


def unmarked(found: list[Block]) -> list[str]:
    """The blocks with commands that are neither marked nor known as not run."""
    return [
        str(block)
        for block in found
        if block.language in SHELL
        and block.mark not in MARKS
        and block.code.splitlines()[0] not in NOT_RUN
    ]


def test_every_command_is_run_or_has_a_reason_not_to_be() -> None:
    found = blocks()
    assert {"README.md", "docs/http-api.md", "docs/operations.md"} <= {b.document for b in found}
    assert unmarked(found) == []
    lines = {block.code.splitlines()[0] for block in found}
    assert set(NOT_RUN) <= lines


def test_a_command_without_a_mark_is_seen() -> None:
    text = "```bash\nrm -r x\n```\n\n```bash test\ntrue\n```\n\n```text\nout\n```\n"
    assert unmarked(blocks_of("a.md", text)) == ["a.md: rm -r x"]


@pytest.mark.parametrize("block", blocks("test"), ids=str)
def test_a_command_that_needs_nothing_works(block: Block, tmp_path: Path) -> None:
    assert block.language == "bash"
    bin_folder = Path(sys.executable).parent
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout


def test_the_launch_command_is_the_one_the_demo_shows() -> None:
    (block,) = blocks("launch")
    words = shlex.split(block.code.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "sglang.launch_server"]
    assert set(FLAGS) <= set(words)
    named = {"--model-path", "tiny-model", "--snapshot-dir", "./snapshots", "--port", "30000"}
    assert set(words[3:]) - set(FLAGS) == named
