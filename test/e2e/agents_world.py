"""A server with agents, killed in the middle of two runs: between steps of one, in a tool of the
other.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import httpx

from e2e.worlds import CONTRACT, FLOAT32, Stage, World, fresh, start
from fences import blocks

HERE = Path(__file__).parent
KEY = "secret-of-the-agents"
HEADERS = {"Authorization": f"Bearer {KEY}"}

AGENTS = (
    *CONTRACT,
    *("--skip-server-warmup", "--max-total-tokens", "8192", "--max-mamba-cache-size", "24"),
    *("--dtype", "float32", "--snapshot-trigger-policy", "manual_only"),
    *("--enable-agent-tools", "--agent-tools-module", "agent_tools"),
    *("--tool-call-parser", "lfm2", "--constrained-json-disable-any-whitespace"),
    *("--api-key", KEY),
)


def forced(*names: str) -> list[Any]:
    """Tool choices: these tools, one a reply, then none."""
    return [*({"type": "function", "function": {"name": name}} for name in names), "none"]


WHERE = ("between steps", "in a tool")
"""Where a run is when the server is killed."""


def plan(where: str) -> dict[str, Any]:
    """A run of three tools; other words for each, so that none is helped by what another stored."""
    ask = f"Count, paint, and count what was painted {where}, please."
    return {
        "messages": [{"role": "user", "content": ask}],
        "tools": ["count", "paint", "gated"],
        "tool_choice": forced("count", "paint", "gated"),
        "max_tokens": 160,
        "temperature": 0,
    }


def agents_world(stage: Stage, folder: Path) -> World:
    """Runs that were killed and resumed, and one that was not."""
    folder = fresh(folder)
    store = folder / "store" / "snapshots"
    tools = folder / "tools"
    tools.mkdir()
    modules = folder / "modules"
    modules.mkdir()
    (example,) = blocks("agent-tools")
    (modules / "shop_tools.py").write_text(example.code)
    paths = (str(HERE), str(modules), *filter(None, [os.environ.get("PYTHONPATH")]))
    env = {
        **FLOAT32,
        "ENGRAM_TEST_TOOLS": str(tools),
        "PYTHONPATH": os.pathsep.join((*paths, str(HERE.parents[1] / "python"))),
    }
    world = start(stage.server(folder, AGENTS, store=store, env=env), store)
    world.client.http.headers.update(HEADERS)
    http, facts = world.client.http, world.facts
    facts["tools"] = tools

    (tools / "gate").touch()
    for where in WHERE:
        whole = begin(http, **plan(where), checkpoint=False)
        facts[f"whole {where}"] = finished(http, whole)
    facts["counts of whole"] = counts(tools)
    stored(http, key="before", value="kept through a kill", category="facts")
    (tools / "gate").unlink()
    (tools / "gated").unlink()
    (tools / "counts").unlink()
    # Those that are killed have the same words: they must find nothing of the whole ones.
    world.client.flush()

    killed = {"in a tool": begin(http, **plan("in a tool"), conversation_id="killed")}
    until(tools / "gated")
    killed["between steps"] = begin(http, **plan("between steps"))
    wait_for(http, killed["between steps"], "tool_result")
    world.server.kill()
    world.server.start()
    (tools / "gate").touch()
    for where, run_id in killed.items():
        facts[f"killed {where}"] = get(http, run_id)
        resumed(http, run_id)
        # One after the other, as those that were not killed had the server to themselves.
        facts[f"resumed {where}"] = finished(http, run_id)
    facts["counts of killed"] = counts(tools)
    return world


def begin(http: httpx.Client, **body: Any) -> str:
    return str(answered(http.post("/v1/agent/runs", json=body))["run_id"])


def resumed(http: httpx.Client, run_id: str, **body: Any) -> dict[str, Any]:
    return answered(http.post(f"/v1/agent/runs/{run_id}/resume", json=body))


def get(http: httpx.Client, run_id: str) -> dict[str, Any]:
    return answered(http.get(f"/v1/agent/runs/{run_id}"))


def stored(http: httpx.Client, **body: Any) -> dict[str, Any]:
    return answered(http.post("/v1/agent/memory/store", json=body))


def answered(response: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = response.json()
    assert response.status_code == 200, body
    assert body["success"] is True
    return body


def events(http: httpx.Client, run_id: str, *, tokens: bool = False) -> list[dict[str, Any]]:
    """All events of a run, to its end."""
    return list(_events(http, run_id, tokens=tokens))


def _events(http: httpx.Client, run_id: str, *, tokens: bool = False) -> Any:
    params = {"tokens": tokens}
    with http.stream("GET", f"/v1/agent/runs/{run_id}/stream", params=params) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def wait_for(http: httpx.Client, run_id: str, event: str) -> None:
    """Return as soon as a run has had such an event."""
    for one in _events(http, run_id):
        if one["event"] == event:
            return
    raise AssertionError(get(http, run_id))


def finished(http: httpx.Client, run_id: str) -> dict[str, Any]:
    """The run when it is over."""
    events(http, run_id)
    return get(http, run_id)


def until(path: Path) -> None:
    """Wait for a file; a hang ends with the test's own limit."""
    while not path.exists():
        time.sleep(0.02)


def counts(tools: Path) -> list[str]:
    return (tools / "counts").read_text().splitlines()


def forget(tools: Path) -> None:
    """Begin to count anew."""
    shutil.rmtree(tools)
    tools.mkdir()
