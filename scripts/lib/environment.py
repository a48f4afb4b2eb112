"""Name what python/pyproject.toml asks for and the running interpreter lacks.

Prints one line for each requirement that is missing or has the wrong version; exits 1 if any.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

PROJECT_FILE = Path(__file__).resolve().parents[2] / "python" / "pyproject.toml"


def wanted(project_file: Path = PROJECT_FILE) -> list[str]:
    """Return the distribution's requirements with those of its `dev` extra, as written there."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads(project_file.read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["dev"]]


def missing(requirements: list[str]) -> list[str]:
    """Return a line for each requirement that this interpreter does not meet."""
    from packaging.requirements import Requirement

    lines = []
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{requirement}: not installed")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            lines.append(f"{requirement}: found {found}")
    return lines


def main() -> int:
    """Print what is missing; return 1 if anything is, else 0."""
    try:
        importlib.metadata.version("sglang-engram")
        lines = missing(wanted())
    except importlib.metadata.PackageNotFoundError:
        lines = ["sglang-engram: not installed"]
    except ModuleNotFoundError as error:
        lines = [f"{error.name}: not installed"]
    for line in lines:
        print(line)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
