"""Which files make up the repository, as git sees it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def repository_files(root: Path = ROOT) -> list[Path]:
    """Return every file under `root` that is tracked, or new and not ignored, sorted.

    New files count, so that a check says before the commit what it would say after it.

    Raises:
        SystemExit: `root` is no git checkout, or git is not installed.
    """
    # safe.directory: in a container the checkout often belongs to another user.
    command = ["git", "-c", "safe.directory=*", "-C", str(root), "ls-files", "-z"]
    command += ["--cached", "--others", "--exclude-standard", "--deduplicate"]
    try:
        listing = subprocess.run(command, check=True, capture_output=True).stdout
    except FileNotFoundError:
        raise SystemExit("git is not installed; install it and run this again") from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip()
        raise SystemExit(f"cannot list the files of {root}: {reason}") from error
    paths = (root / name for name in listing.decode().split("\0") if name)
    # A file deleted but not yet committed is still listed.
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


if __name__ == "__main__":
    # NUL-separated, for `xargs -0`.
    sys.stdout.write("".join(f"{path.relative_to(ROOT)}\0" for path in repository_files()))
