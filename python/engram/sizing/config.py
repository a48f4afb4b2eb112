"""Reads the fields of a config.json, and names the one that is missing or wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from engram.errors import InvalidRequestError, NotFoundError

MAX_CONFIG_BYTES: Final = 16 << 20
MAX_COUNT: Final = 2**32
"""Far above any dimension of a model."""
MAX_LAYERS: Final = 10_000
"""Each takes memory here: a number from somewhere else must not take all of it."""


class Config:
    """The fields of a model's language part. ``source`` names the file in errors."""

    def __init__(self, values: Mapping[str, object], source: str) -> None:
        self._values = values
        self.source = source

    @property
    def architecture(self) -> str:
        """The class that SGLang serves the model with: the first of ``architectures``."""
        names = self._values.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise InvalidRequestError(
                f"{self.source} names no architecture",
                hint="a config.json of a model has a list 'architectures'",
            )
        return names[0]

    def inner(self, name: str) -> Config:
        """The fields of an object inside this one."""
        value = self._values.get(name)
        if not isinstance(value, dict):
            raise self._missing(name)
        return Config(value, f"{self.source}, {name!r}")

    def count(self, *names: str, default: int | None = None) -> int:
        """A whole number above 0: the first of ``names`` that is there and not null."""
        value = next((v for v in map(self._values.get, names) if v is not None), default)
        if value is None:
            raise self._missing(names[0])
        if default is not None and value is default:
            return default
        if type(value) is not int or value <= 0:
            raise InvalidRequestError(
                f"{self.source}: {names[0]!r} must be a whole number above 0, not {value!r}"
            )
        if value > MAX_COUNT:
            raise InvalidRequestError(f"{self.source}: {names[0]!r} is above {MAX_COUNT}")
        return value

    @property
    def layers(self) -> range:
        """The layers, ``num_hidden_layers`` of them."""
        count = self.count("num_hidden_layers")
        self.check_layers(count)
        return range(count)

    def check_layers(self, count: int) -> None:
        """Raise `InvalidRequestError` for more layers than a model can have."""
        if count > MAX_LAYERS:
            raise InvalidRequestError(
                f"{self.source} describes {count} layers, {MAX_LAYERS} are allowed",
                hint="take the config.json as it was published",
            )

    def strings(self, name: str) -> Sequence[str] | None:
        """A list of words; None if it is not there."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InvalidRequestError(f"{self.source}: {name!r} must be a list of words")
        return value

    def numbers(self, name: str) -> Sequence[int] | None:
        """A list of whole numbers; None if it is not there."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise InvalidRequestError(f"{self.source}: {name!r} must be a list of whole numbers")
        return value

    def word(self, *names: str) -> str | None:
        """The first of ``names`` that is a word; None without one."""
        return next((v for v in map(self._values.get, names) if isinstance(v, str)), None)

    def _missing(self, name: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"{self.source} has no {name!r}", hint="take the config.json as it was published"
        )


def read_config(path: Path) -> Config:
    """The config.json at ``path``, or in the model directory ``path``.

    Raises `NotFoundError` without one, `InvalidRequestError` if it is not a JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise InvalidRequestError(f"{file} has over {MAX_CONFIG_BYTES} bytes")
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise NotFoundError(
            f"{file} cannot be read: {error.strerror}",
            hint="name a model directory or its config.json",
        ) from None
    except (ValueError, RecursionError):
        raise InvalidRequestError(f"{file} is not JSON") from None
    if not isinstance(values, dict):
        raise InvalidRequestError(f"{file} is not a JSON object")
    return Config(values, str(file))
