"""The reference pages name every flag, route, field and error, as they are, and no others."""

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
import typer
from fastapi import FastAPI
from pydantic import BaseModel
from typer.core import TyperGroup, TyperOption

from engram.agents.built_in import built_in_tools
from engram.agents.events import TOPICS
from engram.agents.exploring_tools import exploring_tools
from engram.agents.host import AgentHost
from engram.agents.requests import RunRequest
from engram.cli.main import SERVER_COMMANDS, STORE_COMMANDS, app
from engram.cli.remote import connection
from engram.client import Conversation, EngramClient
from engram.errors import walk_error_classes
from engram.server.agent import agent_router
from engram.server.agent_schemas import ExecuteMessage, PingMessage, SubscribeMessage
from engram.server.chat import OWN_FIELDS
from engram.server.prefixes import PrefixBody
from engram.server.schemas import (
    BranchPlace,
    ConversationPatch,
    ListBody,
    MemoryPlace,
    Place,
    RestoreBody,
    SaveBody,
    SnapshotBranch,
    SnapshotPatch,
    SnapshotRestore,
)
from engram.service import SnapshotService
from engram.sglang_plugin.args import FLAGS, REFUSED, _default
from engram.sglang_plugin.http import mount
from engram.sglang_plugin.plugin import HOOKS
from repository import ROOT

DOCS = ROOT / "docs"
SCHEMAS: dict[str, type[BaseModel]] = {
    "/save_snapshot": SaveBody,
    "/restore_snapshot": RestoreBody,
    "/list_snapshots": ListBody,
    "/get_snapshot_info": Place,
    "/v1/snapshots/{snapshot_id}/restore": SnapshotRestore,
    "/v1/snapshots/{snapshot_id}/branch": SnapshotBranch,
    "/v1/prefixes": PrefixBody,
    "/v1/memory/promote": MemoryPlace,
    "/v1/memory/pin": BranchPlace,
    "PATCH /v1/snapshots/{snapshot_id}": SnapshotPatch,
    "PATCH /v1/conversations/{conversation_id}": ConversationPatch,
}


def rows(markdown: str, heading: str) -> list[list[str]]:
    """The cells of the first table under `heading` (its text), header and rule left out."""
    section = re.split(rf"^#+ {re.escape(heading)}$", markdown, flags=re.MULTILINE)[1]
    table = []
    for line in section.splitlines():
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif table:
            break
    return table[2:]


def plain(cell: str) -> str:
    return cell.strip(" |").strip("`")


def test_every_flag_is_documented_as_it_is() -> None:
    table = rows((DOCS / "flags.md").read_text(), "Flags")
    documented = [
        (plain(name), plain(default), plain(active)) for name, default, active, _ in table
    ]
    assert documented == [
        (flag.option, _default(flag), "yes" if flag.active else "not yet") for flag in FLAGS
    ]
    assert all(plain(meaning) for *_, meaning in table)


def test_every_refused_combination_is_documented() -> None:
    text = (DOCS / "flags.md").read_text().split("## Refused combinations")[1].replace("\n", " ")
    words = {
        "--tokenizer-worker-num above 1": "more than one tokenizer worker",
        "another radix cache": "another radix cache or external linker",
        "another external linker": "another radix cache or external linker",
    }
    names = [name for _, _, name, _ in REFUSED]
    assert [name for name in names if words.get(name, name) not in text] == []


def test_every_route_is_documented() -> None:
    settings = SimpleNamespace(snapshot_trigger_policy="every_turn")
    service = cast(SnapshotService, SimpleNamespace(context=SimpleNamespace(settings=settings)))
    served = FastAPI()
    mount(served, service)
    routes = [
        f"{method.upper()} {path}"
        for path, methods in served.openapi()["paths"].items()
        for method in methods
    ]
    headings = re.findall(
        r"^## ((?:POST|GET|PATCH|DELETE) \S+)$", (DOCS / "http-api.md").read_text(), re.MULTILINE
    )
    assert sorted(headings) == sorted(routes)


def test_every_route_of_agents_is_documented_with_its_fields() -> None:
    table = rows((DOCS / "agents.md").read_text(), "Routes")
    documented = {name: about for names, about in table for name in re.findall(r"`([^`]+)`", names)}
    router = agent_router(cast(AgentHost, None))
    schemas = {
        f"{method} {route.path}": route.openapi_extra
        for route in cast(list[Any], router.routes)
        for method in route.methods
    }
    assert set(documented) == set(schemas)
    runs = rows((DOCS / "agents.md").read_text(), "Runs")
    in_prose = {"POST /v1/agent/runs", "POST /v1/agent/runs/{run_id}/resume"}
    for route, extra in schemas.items():
        if extra is None or route in in_prose:
            continue
        body = extra["requestBody"]["content"]["application/json"]["schema"]["properties"]
        named = set(re.findall(r"`(\w+)`", documented[route]))
        if "other_" in documented[route]:
            named |= {f"other_{name}" for name in named - {"other_"}}
        assert named - {"other_"} == set(body), route
    fields = [field for names, _ in runs for field in re.findall(r"`(\w+)`", names)]
    assert fields == list(dict.fromkeys(fields))
    assert set(fields) == set(RunRequest.model_fields)


def test_every_message_of_the_socket_is_documented() -> None:
    text = (DOCS / "agents.md").read_text()
    section = text.split("## WebSocket")[1].split("## MCP")[0]
    table = rows(text, "WebSocket")
    for (name, fields, _), schema in zip(
        table, (ExecuteMessage, SubscribeMessage, PingMessage), strict=True
    ):
        assert plain(name) == schema.model_fields["type"].annotation.__args__[0]  # type: ignore[union-attr]
        assert {"type", *re.findall(r"`(\w+)`", fields)} == set(schema.model_fields)
    assert set(re.findall(r"`(\w+)`", section)) >= TOPICS | {"connected", "heartbeat", "error"}


def test_every_built_in_tool_is_documented() -> None:
    text = (DOCS / "agents.md").read_text()
    tools = built_in_tools(cast(SnapshotService, None), cast(Any, None), cast(Any, None))
    tools += exploring_tools(cast(Any, None))
    assert [tool.spec.name for tool in tools if f"`{tool.spec.name}" not in text] == []


@pytest.mark.parametrize("route", SCHEMAS)
def test_every_field_of_a_body_is_documented(route: str) -> None:
    heading = route if route.startswith("PATCH") else f"POST {route}"
    table = rows((DOCS / "http-api.md").read_text(), heading)
    assert [plain(row[0]) for row in table] == list(SCHEMAS[route].model_fields)


def test_every_field_of_a_chat_is_documented() -> None:
    table = rows(
        (DOCS / "http-api.md").read_text(), "POST /v1/conversations/{conversation_id}/chat"
    )
    assert {plain(row[0]) for row in table} == {*OWN_FIELDS, "messages", "all others"}


def test_every_command_is_documented() -> None:
    text = (DOCS / "cli.md").read_text()
    elsewhere = "".join(path.read_text() for path in DOCS.glob("*.md") if path.name != "cli.md")
    assert [name for name in (*SERVER_COMMANDS, "prefix") if f"engram {name} " not in text] == []
    assert [name for name in STORE_COMMANDS if f"engram {name}" not in elsewhere] == []


def test_every_option_of_a_command_is_documented() -> None:
    """Of those that talk to a server; the other pages have tests of their own."""
    text = (DOCS / "cli.md").read_text()
    every = typer.main.get_command(app)
    assert isinstance(every, TyperGroup)

    def options(command: Any) -> list[str]:
        inner = [one for each in getattr(command, "commands", {}).values() for one in options(each)]
        own = [one for one in command.params if isinstance(one, TyperOption)]
        return [*inner, *(name for one in own for name in one.opts if name.startswith("--"))]

    for name in (*SERVER_COMMANDS, "prefix"):
        found = options(every.commands[name])
        assert [one for one in found if not re.search(rf"{one}(?![\w-])", text)] == [], name


def test_every_exit_status_is_documented() -> None:
    table = rows((DOCS / "cli.md").read_text(), "The engram command")
    own = re.findall(r"^\| (\d+) \| (.+) \|$", connection.__doc__ or "", re.MULTILINE)
    shown = re.findall(r"^\| (\d+) \| (.+) \|$", (DOCS / "cli.md").read_text(), re.MULTILINE)
    assert table
    assert shown == own
    codes = {connection.REFUSED, connection.MISUSED, connection.UNREACHABLE}
    codes |= {connection.NOT_FOUND, connection.INTERRUPTED, 0}
    assert {int(code) for code, _ in own} == codes


def test_every_method_of_the_client_is_documented() -> None:
    text = (DOCS / "client.md").read_text()
    named = set(re.findall(r"`(\w+)[`(]", text))
    methods = {
        name
        for kind in (EngramClient, Conversation)
        for name, value in vars(kind).items()
        if not name.startswith("_") and not isinstance(value, property)
    }
    # Closing is what the `with` does; `over` is how an engine makes its own.
    assert methods - named - {"close", "over"} == set()


def test_every_error_is_documented_with_its_status() -> None:
    table = rows((DOCS / "http-api.md").read_text(), "Errors")
    documented = {(int(status), plain(code)) for status, code, _ in table}
    # Other tests in this process may have made classes of their own.
    ours = [error for error in walk_error_classes() if error.__module__.startswith("engram.")]
    assert documented == {(error.http_status, error.code) for error in ours}
    assert len(documented) == len(table)


def test_every_code_that_no_class_has_is_documented() -> None:
    """Codes that stand in the source by themselves, such as those of events."""
    sources = "".join(path.read_text() for path in (ROOT / "python" / "engram").rglob("*.py"))
    found = set(re.findall(r'"(?:error|code)": "(\w+)"', sources))
    assert "events_lost" in found
    text = "".join(path.read_text() for path in DOCS.glob("*.md"))
    assert [code for code in found if f"`{code}`" not in text] == []


def test_every_room_is_in_the_architecture() -> None:
    table = rows((DOCS / "architecture.md").read_text(), "Rooms")
    package = ROOT / "python" / "engram"
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert {plain(row[0]) for row in table} == rooms | {"errors.py"}


def test_every_hook_of_the_seam_is_in_the_architecture() -> None:
    seam = (DOCS / "architecture.md").read_text().split("## The seam")[1].split("\n## ")[0]
    # Two are the way in of what the table calls routes and messages.
    known = {
        "launch_server": "routers on SGLang's own application",
        "_setup_and_run_http_server": "routers on SGLang's own application",
        "init_request_dispatcher": "handlers on the scheduler's dispatcher",
        "add_cli_args": "ServerArgs.add_cli_args",
    }
    names = [target.rsplit(".", 1)[-1] for target in HOOKS]
    assert [name for name in names if known.get(name, name) not in seam] == []
