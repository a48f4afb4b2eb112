"""Documents that name things of the repository name all of them."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from environment import wanted
from repository import ROOT, repository_files

DECISIONS = ROOT / "docs" / "decisions"
SECTIONS = ["Context", "Decision", "Evidence", "Rejected", "Consequences"]


def record_problems(path: Path, number: int) -> list[str]:
    """Return how a decision record differs from the form its folder's README gives."""
    problems = []
    if not re.fullmatch(rf"{number:04d}-[a-z0-9]+(-[a-z0-9]+)*\.md", path.name):
        problems.append(f"is not named {number:04d}-words-of-the-title.md")
    text = path.read_text()
    if not re.match(rf"# {number:04d}\. \S", text):
        problems.append(f"does not begin with '# {number:04d}. Title'")
    if not re.search(r"^- Status: (accepted|replaced by \[\d{4}\]\(.+\))$", text, re.MULTILINE):
        problems.append("has no status")
    if not re.search(r"^- Date: \d{4}-\d\d-\d\d$", text, re.MULTILINE):
        problems.append("has no date")
    if re.findall(r"^## (.+)$", text, re.MULTILINE) != SECTIONS:
        problems.append(f"has not the sections {', '.join(SECTIONS)}")
    return problems


def undocumented(requirements: list[str], document: str) -> list[str]:
    """Return the requirements that are the first cell of no row of a table in `document`."""
    rows = set(re.findall(r"^\| `([^`]+)`", document, re.MULTILINE))
    names = [Requirement(requirement).name for requirement in requirements]
    return [name for name in names if name not in rows]


def test_every_dependency_has_its_reason() -> None:
    document = (ROOT / "docs" / "dependencies.md").read_text()
    assert undocumented(wanted(), document) == []


def test_a_dependency_without_reason_is_seen() -> None:
    document = "| `blake3` | digests |\nhttpx is mentioned, but has no row\n"
    assert undocumented(["blake3>=1.0", "httpx[http2]>=1"], document) == ["httpx"]


def test_decision_records_have_the_form() -> None:
    records = [path for path in repository_files() if path.parent == DECISIONS]
    records.remove(DECISIONS / "README.md")
    problems = {p.name: record_problems(p, n) for n, p in enumerate(records, start=1)}
    assert {name: found for name, found in problems.items() if found} == {}


def test_the_form_in_the_readme_is_the_one_asked_for(tmp_path: Path) -> None:
    readme = (DECISIONS / "README.md").read_text()
    (form,) = re.findall(r"^```markdown\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    record = tmp_path / "0001-keep-it-simple.md"
    record.write_text(form)
    assert record_problems(record, 1) == []


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("1-title.md", "", "is not named"),
        ("0002-gap.md", "", "is not named"),
        ("0001-title.md", "# Title\n", "does not begin"),
        ("0001-title.md", "- Status: maybe\n", "has no status"),
        ("0001-title.md", "- Date: yesterday\n", "has no date"),
        ("0001-title.md", "## Context\n\n## Decision\n", "has not the sections"),
    ],
)
def test_a_record_of_another_form_is_seen(
    tmp_path: Path, name: str, text: str, problem: str
) -> None:
    record = tmp_path / name
    record.write_text(text)
    assert [found for found in record_problems(record, 1) if found.startswith(problem)]
