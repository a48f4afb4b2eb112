"""Fingerprint of a model directory: its configuration and its weights.

`full` digests every byte.  `fast` digests each file's size, its head (in a safetensors file: names,
dtypes, shapes and offsets) and blocks spread evenly over it, which a changed training step or
another quantisation does not survive, in milliseconds a file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final, Literal

from blake3 import blake3

from engram.core.canonical import canonical_json
from engram.errors import InvalidRequestError

WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
HEAD_BYTES: Final = 1 << 20
BLOCK_BYTES: Final = 64 << 10
BLOCKS: Final = 32

VOLATILE_CONFIG_FIELDS: Final = frozenset({"_name_or_path", "transformers_version"})
"""Fields of config.json that say how the file came about, not what the model computes."""


def config_digest(model_dir: str | os.PathLike[str]) -> str:
    """BLAKE3 of the model's config.json, without what does not change its results."""
    path = Path(model_dir) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequestError(
            f"cannot read {path.name} of the model: {error}",
            hint="snapshots need a model directory with a config.json",
        ) from None
    kept = {name: value for name, value in config.items() if name not in VOLATILE_CONFIG_FIELDS}
    return blake3(canonical_json(kept)).hexdigest()


def weight_files(model_dir: str | os.PathLike[str]) -> list[Path]:
    """The files of a model directory that hold weights, by name."""
    return sorted(path for path in Path(model_dir).iterdir() if path.suffix in WEIGHT_SUFFIXES)


def weights_digest(model_dir: str | os.PathLike[str], mode: Literal["fast", "full"]) -> str:
    """BLAKE3 over the weight files of a directory, in the order of their names."""
    files = weight_files(model_dir)
    if not files:
        raise InvalidRequestError(
            f"the model directory holds no weights ({', '.join(WEIGHT_SUFFIXES)})",
            hint="a snapshot must know which weights made it",
        )
    total = blake3(mode.encode())
    for path in files:
        total.update(canonical_json([path.name, path.stat().st_size]))
        total.update(_full(path) if mode == "full" else _sampled(path))
    return total.hexdigest()


def _full(path: Path) -> bytes:
    digest = blake3(max_threads=blake3.AUTO)
    digest.update_mmap(path)
    return digest.digest()


def _sampled(path: Path) -> bytes:
    digest = blake3()
    size = path.stat().st_size
    with path.open("rb") as file:
        digest.update(file.read(HEAD_BYTES))
        for block in range(BLOCKS):
            file.seek(max(0, (size - BLOCK_BYTES) * (block + 1) // BLOCKS))
            digest.update(file.read(BLOCK_BYTES))
    return digest.digest()
