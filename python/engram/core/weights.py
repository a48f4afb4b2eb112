"""Fingerprint of a model directory: its configuration and its weights.

`full` digests every byte.  `fast` digests each file's size, its head (in a safetensors file: names,
dtypes, shapes and offsets) and blocks spread evenly over it, which a changed training step or
another quantisation does not survive, in milliseconds a file.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from blake3 import blake3

from engram.core.canonical import canonical_json
from engram.errors import InvalidRequestError

WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
HEAD_BYTES: Final = 1 << 20
BLOCK_BYTES: Final = 64 << 10
BLOCKS: Final = 32
MAX_HEADER_BYTES: Final = 100_000_000
"""The limit of the safetensors format itself."""

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


ADAPTER_FILES: Final = ("adapter_config.json", "added_tokens.json")
"""What SGLang reads of a LoRA adapter beside its weights."""


def adapter_digest(adapter_dir: str | os.PathLike[str], mode: Literal["fast", "full"]) -> str:
    """BLAKE3 over the configuration and the weights of a LoRA adapter's directory.

    Raises `InvalidRequestError` where there are none.
    """
    total = blake3()
    for name in ADAPTER_FILES:
        path = Path(adapter_dir) / name
        contents = path.read_bytes() if path.is_file() else None
        if contents is None and name == ADAPTER_FILES[0]:
            raise InvalidRequestError(
                f"there is no {name} in {str(adapter_dir)!r}",
                hint="snapshots need the directory of a LoRA adapter as PEFT writes it",
            )
        total.update(canonical_json([name, None if contents is None else len(contents)]))
        total.update(contents or b"")
    total.update(weights_digest(adapter_dir, mode).encode())
    return total.hexdigest()


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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model directory as it was when somebody looked.

    `names` is the BLAKE3 of the names of its tensors, None where they cannot be told cheaply (only
    safetensors files begin with them).
    """

    digest: str
    names: str | None

    @classmethod
    def read(cls, model_dir: str | os.PathLike[str], mode: Literal["fast", "full"]) -> Checkpoint:
        """Look at a directory.  Raises `InvalidRequestError` where there are no weights."""
        return cls(weights_digest(model_dir, mode), _names_digest(model_dir))

    def replaces(self, other: Checkpoint) -> bool:
        """True if loading this over `other` leaves nothing of `other` behind."""
        return self.digest == other.digest or (self.names is not None and self.names == other.names)


def files_identity(model_dir: str | os.PathLike[str]) -> tuple[object, ...]:
    """What changes whenever a weight file of the directory is written or exchanged."""
    found = []
    for path in weight_files(model_dir):
        stat = path.stat()
        found.append((path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(found)


def _names_digest(model_dir: str | os.PathLike[str]) -> str | None:
    names: list[str] = []
    for path in weight_files(model_dir):
        if path.suffix != ".safetensors":
            return None
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(min(size, MAX_HEADER_BYTES)))
            except ValueError:
                return None
        if not isinstance(header, dict):
            return None
        names += header.keys() - {"__metadata__"}
    return blake3(canonical_json(sorted(names))).hexdigest()


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
