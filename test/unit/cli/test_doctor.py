"""`engram doctor` in a process of its own, as a person calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engram.cli.main import app
from engram.sglang_plugin import compat
from engram.sglang_plugin.plugin import HOOKS
from engram.store.disk import DiskStore
from engram.version import SUPPORTED_SGLANG, __version__


def test_a_healthy_installation_in_json(tmp_path: Path) -> None:
    DiskStore.open(tmp_path / "store").close()
    result = subprocess.run(
        [
            *(sys.executable, "-m", "engram.cli.main", "doctor", "--json"),
            *("--snapshot-dir", str(tmp_path / "store")),
        ],
        capture_output=True,
        text=True,
    )
    report = json.loads(result.stdout)
    assert report["problems"] == []
    assert (result.returncode, report["healthy"]) == (0, True)
    assert report["engram"] == __version__
    assert report["sglang"] == report["sglang_supported"] == SUPPORTED_SGLANG
    assert {hook["target"]: hook["kind"] for hook in report["hooks"]} == {
        target: kind for target, (_, kind) in HOOKS.items()
    }
    assert all(hook["applied"] for hook in report["hooks"])
    assert report["store"]["directory"] == str(tmp_path / "store")
    # Every kernel belongs to a machine without an accelerator, and there it has some.
    assert bool(report["kernels"]) == report["device"].startswith("CPU")


def test_a_problem_is_shown_and_sets_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = compat.Problem("sglang.srt.something", "self", "self, other")
    monkeypatch.setattr(compat, "problems", lambda: [problem])
    monkeypatch.setattr(compat, "unapplied", lambda targets: [next(iter(targets))])
    result = CliRunner().invoke(app, ["doctor", "--snapshot-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert str(problem) in result.output
    assert f"the hook on {next(iter(HOOKS))} was not applied" in result.output
    assert f"{tmp_path} is no snapshot store" in result.output
    assert f"{len(HOOKS) - 1} of {len(HOOKS)}" in result.output
    assert "all is well" not in result.output


def test_another_sglang_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compat, "installed_sglang", lambda: "0.5.24")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(result.output)
    assert result.exit_code == 1
    assert report["store"] is None
    assert f"SGLang is 0.5.24; this Engram supports {SUPPORTED_SGLANG}" in report["problems"]


def test_the_version_is_told() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"{__version__}\n")
