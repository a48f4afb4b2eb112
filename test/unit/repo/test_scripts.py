"""The commands of the repository explain themselves and fail with the way out."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

from e2e.exactness import VARIANTS
from engram.testing.tiny_model import FAMILIES
from environment import missing, wanted
from histories import test_histories
from repository import ROOT, repository_files

SUITES_OF_THE_MATRIX = ["test/e2e/test_families.py", "test/e2e/test_replicas.py"]
STEPS = ["lint", "format", "whitespace", "spelling", "types", "layers"]


def run(
    script: Path, *arguments: str, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [script, *arguments],
        env={**os.environ, "ENGRAM_PYTHON": python},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def commands() -> list[Path]:
    """Return the files meant to be run by name: those right in scripts/ and .ci/."""
    return [path for path in repository_files() if path.parent in (ROOT / "scripts", ROOT / ".ci")]


def help_problem(script: Path) -> str | None:
    """Return what is wrong with `script --help`, or None."""
    if not os.access(script, os.X_OK):
        return "is not executable"
    result = run(script, "--help")
    if result.returncode != 0:
        return f"exits {result.returncode}: {result.stderr}"
    return None if "usage:" in result.stdout.lower() else "prints no usage"


def write_script(path: Path, body: str, mode: int = 0o755) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(mode)
    return path


def test_every_command_explains_itself() -> None:
    names = {str(path.relative_to(ROOT)) for path in commands()}
    wanted_names = {"scripts/install", "scripts/check", "scripts/demo", "scripts/test", ".ci/run"}
    assert wanted_names <= names
    problems = {path.name: help_problem(path) for path in commands()}
    assert {name: problem for name, problem in problems.items() if problem} == {}


def test_a_command_explains_itself_from_another_folder() -> None:
    script = os.path.relpath(ROOT / "scripts/check", ROOT / "docs")
    result = subprocess.run([script, "--help"], cwd=ROOT / "docs", capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Usage: scripts/check" in result.stdout


@pytest.mark.parametrize(
    ("body", "mode", "problem"),
    [
        ("echo 'Usage: x'; exit 3", 0o755, "exits 3"),
        ("echo hello", 0o755, "prints no usage"),
        ("echo 'Usage: x'", 0o644, "is not executable"),
    ],
)
def test_a_command_without_help_is_seen(tmp_path: Path, body: str, mode: int, problem: str) -> None:
    script = write_script(tmp_path / "script", body, mode)
    assert (help_problem(script) or "").startswith(problem)


@pytest.mark.parametrize("name", ["scripts/install", "scripts/check", "scripts/demo", ".ci/run"])
def test_an_unknown_argument_is_refused(name: str) -> None:
    result = run(ROOT / name, "nonsense")
    assert result.returncode == 2
    assert "nonsense" in result.stderr


@pytest.mark.parametrize(
    "name", ["scripts/install", "scripts/check", "scripts/demo", "scripts/test"]
)
def test_an_interpreter_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    result = run(ROOT / name, python=str(tmp_path / "python"))
    assert result.returncode == 2
    assert f"ENGRAM_PYTHON={tmp_path}/python" in result.stderr


def test_an_interpreter_without_the_packages_is_told_how_to_get_them(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True, with_pip=False)
    python = str(tmp_path / "bare" / "bin" / "python")
    result = run(ROOT / "scripts/install", python=python)
    assert result.returncode == 2
    assert "sglang-engram: not installed" in result.stderr
    assert f"{python} -m pip install -e" in result.stderr


def test_this_interpreter_has_everything() -> None:
    requirements = wanted()
    assert "sglang==" in "".join(requirements)
    assert missing(requirements) == []


@pytest.mark.parametrize(
    ("requirement", "lines"),
    [
        ("pytest", []),
        ("pytest>=9999", [f"pytest>=9999: found {pytest.__version__}"]),
        ("no-such-distribution>=1", ["no-such-distribution>=1: not installed"]),
        ("no-such-distribution; python_version < '3'", []),
    ],
)
def test_a_missing_requirement_is_named(requirement: str, lines: list[str]) -> None:
    assert missing([requirement]) == lines


@pytest.mark.parametrize(
    ("source", "status", "last"),
    [
        ("def test_it(): assert True", 0, "passed"),
        ("def test_it(): assert False", 1, "failed: the tests named"),
        ("", 1, "failed: no test was run"),
    ],
)
def test_the_exit_status_of_a_test_run(tmp_path: Path, source: str, status: int, last: str) -> None:
    file = tmp_path / "test_sample.py"
    file.write_text(source)
    result = run(ROOT / "scripts/test", str(file))
    assert result.returncode == status, result.stdout + result.stderr
    assert result.stdout.rstrip().endswith(last)


def pytest_that_tells(tmp_path: Path, *, gpu: bool = False) -> str:
    """A Python that says what pytest would do, on a machine with a GPU or without."""
    return str(
        write_script(
            tmp_path / "python",
            f"""case "$*" in
*pytest*) echo "run ${{*:4}} ${{ENGRAM_MATRIX_RECORD:+recorded}}" ;;
*torch.cuda*) exit {int(not gpu)} ;;
*) exec {sys.executable} "$@" ;;
esac""",
        )
    )


def runs_of(tmp_path: Path, *arguments: str, gpu: bool = False) -> list[str]:
    """What `scripts/test` would have pytest do, a line for each run."""
    result = run(ROOT / "scripts/test", *arguments, python=pytest_that_tells(tmp_path, gpu=gpu))
    assert result.returncode == 0, result.stdout + result.stderr
    return [line.rstrip() for line in re.findall(r"^run pytest (.*)$", result.stdout, re.MULTILINE)]


def test_only_the_matrix_runs_what_is_not_quick(tmp_path: Path) -> None:
    quick, slow = "mamba2-float32", "llama-bfloat16"
    assert {quick: True, slow: False}.items() <= {v.name: v.quick for v in VARIANTS}.items()
    found = run(ROOT / "scripts/test", "test/e2e/test_families.py", "--collect-only", "-q")
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"test_replies_are_those_of_transformers[{quick}]" in found.stdout
    assert f"[{slow}" not in found.stdout
    wanted = [f"{one} -m matrix or not matrix" for one in SUITES_OF_THE_MATRIX]
    assert runs_of(tmp_path, "--matrix") == wanted


def test_what_needs_a_gpu_is_recorded_and_fails_without_one(tmp_path: Path) -> None:
    suites = ["test/unit/conditional_memory", *SUITES_OF_THE_MATRIX]
    wanted = [f"{one} -m matrix or not matrix recorded" for one in suites]
    assert runs_of(tmp_path, "--gpu", gpu=True) == wanted
    without = run(ROOT / "scripts/test", "--gpu", python=pytest_that_tells(tmp_path))
    assert without.returncode == 2
    assert "no CUDA GPU" in without.stderr
    assert "run pytest" not in without.stdout


def test_histories_are_run_for_every_family_and_only_when_asked_for(tmp_path: Path) -> None:
    assert runs_of(tmp_path, "--histories") == ["test/histories -rP"]
    assert not [line for line in runs_of(tmp_path) if "histories" in line]
    tests = [t for name, t in vars(test_histories).items() if name.startswith("test_")]
    marks = [mark for test in tests for mark in test.pytestmark if mark.name == "parametrize"]
    assert [mark.args for mark in marks] == [("family", sorted(FAMILIES))] * 2


def test_the_hooks_are_the_steps_of_check() -> None:
    known = run(ROOT / "scripts/check", "nonsense").stderr
    assert re.findall(r"there are: (.*)", known) == [" ".join(STEPS)]
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert [hook["entry"] for hook in hooks] == [f"scripts/check {step}" for step in STEPS]
    assert {hook["language"] for hook in hooks} == {"system"}
