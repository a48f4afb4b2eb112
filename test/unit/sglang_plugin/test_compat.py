"""The check that SGLang is the one the hooks were written for."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from engram.sglang_plugin import compat
from engram.sglang_plugin.compat import EXPECTED, Problem, problems, shape
from engram.sglang_plugin.plugin import HOOKS
from engram.version import SUPPORTED_SGLANG

CHECKPOINT = compat.TREE + "checkpoint"
INIT_LINKER = compat.TREE + "init_cache_linker"


def test_the_installed_sglang_is_as_expected() -> None:
    assert compat.installed_sglang() == SUPPORTED_SGLANG
    assert problems() == []


def test_every_hook_is_on_a_name_that_is_checked() -> None:
    assert set(HOOKS) <= set(EXPECTED)


def test_a_missing_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(UnifiedRadixCache, "init_cache_linker")
    [problem] = problems()
    assert problem == Problem(INIT_LINKER, EXPECTED[INIT_LINKER], "")
    assert str(problem) == f"{INIT_LINKER} is missing"


def test_a_missing_module_is_found() -> None:
    name = "sglang.srt.mem_cache.no_such_module.function"
    assert problems({name: "self"}) == [Problem(name, "self", "")]


@pytest.mark.parametrize(
    "changed",
    [
        lambda self, request, *, up_to, **kwargs: None,
        lambda self, req, up_to, **kwargs: None,
        lambda self, req, *, up_to: None,
        lambda self, req, *, up_to=0, **kwargs: None,
        lambda self, req, extra, *, up_to, **kwargs: None,
        lambda self, req, *args, up_to, **kwargs: None,
    ],
    ids=["renamed", "positional", "fewer", "optional", "more", "variable"],
)
def test_changed_parameters_are_found(monkeypatch: pytest.MonkeyPatch, changed: Any) -> None:
    monkeypatch.setattr(UnifiedRadixCache, "checkpoint", changed)
    [problem] = problems()
    assert problem.name == CHECKPOINT
    assert problem.found == shape(changed) != problem.expected
    assert problem.found in str(problem)


def test_our_own_wrapper_is_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    original = UnifiedRadixCache.checkpoint

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    monkeypatch.setattr(UnifiedRadixCache, "checkpoint", wrapper)
    assert problems() == []


def test_shapes_are_written_like_signatures() -> None:
    def function(a: int, b: int = 1, *rest: int, c: int, d: int = 2, **more: int) -> None: ...

    def keyword(a: int, *, b: int = 1) -> None: ...

    assert shape(function) == "a, b=, *rest, c, d=, **more"
    assert shape(keyword) == "a, *, b="


def test_a_server_does_not_start_on_another_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(UnifiedRadixCache, "init_cache_linker")
    monkeypatch.setattr(compat, "unapplied", lambda targets: ["a.hook"])
    with pytest.raises(SystemExit) as caught:
        compat.require_whole(["a.hook"])
    message = str(caught.value)
    assert f"{INIT_LINKER} is missing" in message
    assert "a.hook was not applied" in message
    assert SUPPORTED_SGLANG in message
    assert "--enable-snapshot-persistence" in message


def test_hooks_that_were_not_applied_are_found() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    applied = next(iter(HookRegistry._patched), None)
    targets = ["nobody.hooked.this", *([applied] if applied else [])]
    assert compat.unapplied(targets) == ["nobody.hooked.this"]
