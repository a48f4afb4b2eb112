"""Routes of SGLang that would falsify stored states are refused, all others pass."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from engram.server.refusing import REFUSED_ROUTES, RefusingMiddleware
from refusals import refusal


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()

    @app.post("/{path:path}")
    async def reached(path: str) -> dict[str, str]:
        return {"reached": path}

    app.add_middleware(RefusingMiddleware)
    return TestClient(app)


@pytest.mark.parametrize("path", sorted(REFUSED_ROUTES))
def test_what_snapshots_cannot_survive_is_refused(client: TestClient, path: str) -> None:
    reply = client.post(path, json={})
    assert reply.status_code == 422
    assert refusal(reply)["error"] == "unsupported"
    assert path in reply.json()["message"]


def test_a_root_path_opens_no_way_around(client: TestClient) -> None:
    app = client.app
    behind = TestClient(app, root_path="/api")
    path = sorted(REFUSED_ROUTES)[0]
    assert behind.post("/api" + path, json={}).status_code == 422
    assert behind.post(path, json={}).status_code == 422


def test_the_routes_exist_in_the_sglang_that_is_supported() -> None:
    from sglang.srt.entrypoints.http_server import app

    assert {route.path for route in app.routes if hasattr(route, "path")} >= set(REFUSED_ROUTES)


def test_other_routes_pass(client: TestClient) -> None:
    assert client.post("/generate", json={}).json() == {"reached": "generate"}
