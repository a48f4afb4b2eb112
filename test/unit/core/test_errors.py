"""The error tree: every class maps to HTTP, travels between processes, and is in the drawing."""

import pickle

import pytest

import engram.errors
from engram.errors import (
    EngramError,
    NamespaceMismatchError,
    SegmentCorruptError,
    SnapshotCorruptError,
    StoreFormatError,
    StoreFullError,
    error_from_dict,
    walk_error_classes,
)

CLASSES = list(walk_error_classes())


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_has_an_http_status_and_a_code(cls: type[EngramError]) -> None:
    assert 400 <= cls.http_status <= 599
    assert cls.code.isidentifier()
    assert cls.code == cls.code.lower()


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_is_drawn_with_its_status_and_exported(cls: type[EngramError]) -> None:
    drawing = engram.errors.__doc__ or ""
    (line,) = [line for line in drawing.splitlines() if f" {cls.__name__} " in f" {line.strip()} "]
    assert str(cls.http_status) in line
    assert cls.code in line
    assert cls.__name__ in engram.errors.__all__


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_survives_pickling(cls: type[EngramError]) -> None:
    error = pickle.loads(pickle.dumps(cls("what", hint="do", details={"n": 1})))
    assert type(error) is cls
    assert (error.message, error.hint, error.details) == ("what", "do", {"n": 1})


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_survives_the_wire(cls: type[EngramError]) -> None:
    error = error_from_dict(cls("what", hint="do", details={"n": 1}).to_dict())
    assert issubclass(cls, type(error))
    assert (error.code, error.http_status) == (cls.code, cls.http_status)
    assert (error.message, error.hint, error.details) == ("what", "do", {"n": 1})


def test_an_unknown_code_becomes_the_root() -> None:
    assert type(error_from_dict({"error": "from_the_future", "details": 3})) is EngramError


def test_the_body_of_a_reply() -> None:
    assert StoreFullError.of(needed=10, free=3, where="disk").to_dict() == {
        "success": False,
        "error": "store_full",
        "message": "the snapshot store is full: 10 bytes needed, 3 free in disk",
        "hint": "free space, delete snapshots, or lower the retention count",
        "details": {"needed": 10, "free": 3, "where": "disk"},
    }


def test_a_mismatch_names_field_and_both_values() -> None:
    error = NamespaceMismatchError.of("kv.dtype", "BF16", "F16")
    assert error.details == {"field": "kv.dtype", "wanted": "BF16", "found": "F16"}
    for part in ("kv.dtype", "BF16", "F16"):
        assert part in error.message


def test_a_newer_format_is_named() -> None:
    error = StoreFormatError.of("a segment", 7, 1)
    assert "a segment has format version 7, this Engram reads version 1" in str(error)
    assert error.hint in str(error)


def test_corruption_is_one_family() -> None:
    assert issubclass(SegmentCorruptError, SnapshotCorruptError)
    assert SegmentCorruptError.code == "snapshot_corrupt"
