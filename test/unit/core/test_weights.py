"""Fingerprints of model directories: what changes them, and when one replaces another whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engram.core.weights import Checkpoint, files_identity
from engram.errors import InvalidRequestError


def write(folder: Path, value: float, names: tuple[str, ...] = ("a", "b"), parts: int = 1) -> Path:
    """A model directory of `parts` files, every weight of it `value`."""
    folder.mkdir(exist_ok=True)
    for part in range(parts):
        tensors = {name: torch.full((4,), value) for name in names[part::parts]}
        save_file(tensors, folder / f"model-{part}.safetensors")
    return folder


@pytest.mark.parametrize("mode", ["fast", "full"])
def test_other_values_are_other_weights_of_the_same_tensors(tmp_path: Path, mode: str) -> None:
    assert mode in ("fast", "full")
    first = Checkpoint.read(write(tmp_path / "1", 1.0), mode)  # type: ignore[arg-type]
    second = Checkpoint.read(write(tmp_path / "2", 2.0), mode)  # type: ignore[arg-type]
    again = Checkpoint.read(write(tmp_path / "3", 1.0), mode)  # type: ignore[arg-type]
    assert first == again
    assert first.digest != second.digest
    assert first.names is not None
    assert first.names == second.names
    assert second.replaces(first)


def test_how_tensors_are_spread_over_files_is_not_in_their_names(tmp_path: Path) -> None:
    one = Checkpoint.read(write(tmp_path / "1", 1.0), "fast")
    two = Checkpoint.read(write(tmp_path / "2", 1.0, parts=2), "fast")
    assert one.names == two.names
    assert two.replaces(one)


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c"), ("a", "c")])
def test_a_directory_with_other_tensors_leaves_some_behind(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    whole = Checkpoint.read(write(tmp_path / "whole", 1.0), "fast")
    other = Checkpoint.read(write(tmp_path / "other", 2.0, names), "fast")
    assert not other.replaces(whole)


@pytest.mark.parametrize("damage", ["a .bin beside it", "no header", "a list for a header"])
def test_names_that_cannot_be_told_are_in_doubt(tmp_path: Path, damage: str) -> None:
    whole = Checkpoint.read(write(tmp_path / "whole", 1.0), "fast")
    folder = write(tmp_path / "other", 2.0)
    if damage == "a .bin beside it":
        (folder / "pytorch_model.bin").write_bytes(b"weights")
    else:
        header = b"not json" if damage == "no header" else b"[1]"
        path = folder / "model-0.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    other = Checkpoint.read(folder, "fast")
    assert other.names is None
    assert not other.replaces(whole)
    assert other.replaces(other), "the very same files replace themselves"


def test_a_directory_without_weights_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no weights"):
        Checkpoint.read(tmp_path, "fast")


def test_files_that_are_written_or_exchanged_are_not_the_same(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", 1.0)
    before = files_identity(folder)
    assert files_identity(folder) == before
    path = folder / "model-0.safetensors"
    copy = write(tmp_path / "copy", 1.0) / path.name
    stat = path.stat()
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    copy.rename(path)
    assert files_identity(folder) != before, "same bytes, same time, another file"
