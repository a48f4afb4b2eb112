"""The configurations of public models, and ways to change them."""

import json
from pathlib import Path
from typing import Any

from engram.sizing import ModelSize, Precision, read_config, size_of
from engram.sizing.config import Config
from repository import ROOT

CONFIGS = ROOT / "test" / "data" / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))


def fields(name: str) -> dict[str, Any]:
    values = json.loads((CONFIGS / f"{name}.json").read_text())
    assert isinstance(values, dict)
    return values


def sized(name: str, ranks: int = 1, **precision: str) -> ModelSize:
    config = read_config(CONFIGS / f"{name}.json")
    return size_of(config, ranks=ranks, precision=Precision(**precision))


def sized_fields(values: dict[str, Any], ranks: int = 1) -> ModelSize:
    return size_of(Config(values, "the config"), ranks=ranks)


def model_directory(path: Path, values: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(values))
    return path
