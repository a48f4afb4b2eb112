"""What no file of the repository may contain, and what every source file must survive."""

import ast
import re
import warnings

import pytest

from repository import ROOT, repository_files

# Folders below which a path belongs to one machine or one person.
MACHINE_PATH = re.compile(
    r"(?<![\w.$}/-])/(?:farm|home|mnt|root|scratch|tmp|Users|work|workspace)/\w"
)
# Put together here, so that this file does not contain what it looks for.
REGISTRY_HOST = re.compile(
    "|".join(
        re.escape(".".join(labels))
        for labels in (
            ("pypi", "org"),
            ("pythonhosted", "org"),
            ("registry", "npmjs"),
            ("deb", "debian", "org"),
            ("archive", "ubuntu", "com"),
            ("conda", "anaconda", "org"),
            ("download", "pytorch", "org"),
            ("crates", "io"),
        )
    )
)
OLDEST_PYTHON = (3, 10)


def occurrences(pattern: re.Pattern[str], text: str) -> list[str]:
    """Return 'line N: the line' for each line of `text` in which `pattern` occurs."""
    lines = enumerate(text.splitlines(), start=1)
    return [f"line {number}: {line.strip()}" for number, line in lines if pattern.search(line)]


def found_in_repository(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}, {hit}"
        for path in repository_files()
        for hit in occurrences(pattern, path.read_text(errors="replace"))
    ]


def syntax_problem(source: str) -> str | None:
    """Return what a compiler that takes warnings for errors says, also as the oldest Python.

    The warnings are collected, not turned into errors: the interpreter remembers the filters of
    its last warning, and under "error" the one that sentencepiece's module causes when Python ends
    crashes the process.
    """
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        try:
            ast.parse(source, feature_version=OLDEST_PYTHON)
            compile(source, "source", "exec", dont_inherit=True)
        except SyntaxError as error:
            return str(error)
    return str(found[0].message) if found else None


def test_the_listing_sees_the_repository() -> None:
    names = {str(path.relative_to(ROOT)) for path in repository_files()}
    assert {"LICENSE", "pyproject.toml", "python/engram/__init__.py", ".ci/run"} <= names
    assert not [name for name in names if name.startswith((".git/", ".venv/"))]


def test_no_machine_path() -> None:
    assert found_in_repository(MACHINE_PATH) == []


@pytest.mark.parametrize("folder", ["tmp", "home", "root", "work", "Users"])
@pytest.mark.parametrize("around", ["{}", "--dir {}", 'x = "{}"', "(see {})", "`{}`", "a:{}"])
def test_a_machine_path_is_seen(folder: str, around: str) -> None:
    path = "/".join(["", folder, "someone", "model"])
    assert occurrences(MACHINE_PATH, around.format(path))


@pytest.mark.parametrize(
    "text", ["${TMPDIR:-/tmp}", "https://host/home/page", "test/tmp/x", "GET /work", "./home/x"]
)
def test_other_paths_are_left_alone(text: str) -> None:
    assert occurrences(MACHINE_PATH, text) == []


def test_no_registry_host() -> None:
    assert found_in_repository(REGISTRY_HOST) == []


def test_a_registry_host_is_seen() -> None:
    text = "first\nindex-url = https://" + ".".join(["pypi", "org"]) + "/simple\n"
    assert occurrences(REGISTRY_HOST, text) == ["line 2: " + text.splitlines()[1]]


def test_source_compiles_without_a_warning() -> None:
    sources = {path: path.read_text() for path in repository_files() if path.suffix == ".py"}
    assert len(sources) > 5
    problems = {path: syntax_problem(source) for path, source in sources.items()}
    assert {path: problem for path, problem in problems.items() if problem} == {}


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("pattern = '\\d'", "invalid escape sequence"),
        ("x = 1\nif x is 1: pass", '"is" with'),
        ("try: pass\nexcept* ValueError: pass", "3.11"),
        ("def f(:", "invalid syntax"),
    ],
)
def test_bad_source_is_seen(source: str, problem: str) -> None:
    assert problem in (syntax_problem(source) or "")
