"""Without its flag the plug-in changes nothing: every reply is that of SGLang with CPU kernels."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import pytest

from e2e.worlds import World


def differences(one: Any, other: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    """Where two values differ, and how; whole objects only where one of them is missing."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            found
            for key in sorted(one.keys() | other.keys())
            for found in differences(one.get(key), other.get(key), f"{place}/{key}")
        ]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        pairs = zip_longest(one, other)
        return [
            found
            for index, pair in enumerate(pairs)
            for found in differences(*pair, f"{place}/{index}")
        ]
    return [] if one == other else [(place, one, other)]


def compared(off: World) -> tuple[Any, Any, Any]:
    """The requests, and the answers of both servers."""
    return off.facts["sent"], off.facts["plugin"], off.facts["stock"]


def test_replies_are_those_of_sglang(off: World) -> None:
    found = [
        (request[:2], difference)
        for request, plugin, stock in zip(*compared(off), strict=True)
        for difference in differences((plugin.status, plugin.body), (stock.status, stock.body))
    ]
    assert found == []


def test_requests_were_served(off: World) -> None:
    """Else the comparison would be one of errors."""
    sent, plugin, _ = compared(off)
    served = {path for (_, path, _), a in zip(sent, plugin, strict=True) if a.status == 200}
    assert {"/generate", "/v1/chat/completions", "/v1/completions"} <= served


@pytest.mark.parametrize("path", ["/save_snapshot", "/restore_snapshot", "/list_snapshots"])
def test_snapshot_routes_are_not_there(off: World, path: str) -> None:
    sent, plugin, _ = compared(off)
    index = next(n for n, (_, p, _) in enumerate(sent) if p == path)
    assert plugin[index].status == 404
