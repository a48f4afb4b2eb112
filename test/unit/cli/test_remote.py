"""The commands that talk to a server, as people and scripts call them, over real HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from engram.cli.main import SERVER_COMMANDS, app
from engram.cli.remote.places import parse
from engram.conversation.turns import Tag
from engram.errors import EngramError
from unit.client.live import Live

UNREACHABLE = "http://127.0.0.1:1"


class Command:
    """Runs `engram` against a live server."""

    def __init__(self, live: Live) -> None:
        self.live = live

    def run(self, *words: str, typed: str | None = None, **env: str) -> Result:
        given = {"ENGRAM_URL": self.live.url, "COLUMNS": "200", "NO_COLOR": "1", **env}
        return CliRunner().invoke(app, list(words), env=given, input=typed)

    def ok(self, *words: str, **options: Any) -> str:
        result = self.run(*words, **options)
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, *words: str) -> Any:
        return json.loads(self.ok(*words, "--json"))

    def fails(self, status: int, *words: str, **options: Any) -> str:
        result = self.run(*words, **options)
        assert result.exit_code == status, (result.exit_code, result.output)
        assert result.stdout == ""
        return result.stderr


@pytest.fixture
def command(live: Live) -> Command:
    return Command(live)


@pytest.fixture
def tour(live: Live, command: Command) -> list[str]:
    """A conversation of three turns, all saved, with a branch at the second; their ids."""
    live.chat("tour", turns=3)
    names = [command.json("save", f"tour@{turn}")["snapshot_id"] for turn in (1, 2, 3)]
    return [*names, command.json("branch", "tour@2", "other")["snapshot_id"]]


def test_ls(command: Command, live: Live, tour: list[str]) -> None:
    live.chat("zoo")
    command.ok("save", "zoo")
    lines = command.ok("ls").splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [
        ["tour", "3", "2", "4"],
        ["zoo", "1", "1", "1"],
    ]
    found = command.json("ls")
    assert [one["conversation_id"] for one in found["conversations"]] == ["tour", "zoo"]
    assert found["more"] is False
    assert "there are more" in command.ok("ls", "--limit", "1")
    assert [one["snapshot_id"] for one in command.json("ls", "tour")["snapshots"]] == tour
    of_main = command.json("ls", "tour/main")["snapshots"]
    assert [one["snapshot_id"] for one in of_main] == tour[:3]
    assert all(name in command.ok("ls", "tour") for name in tour)
    assert "nobody" in command.fails(4, "ls", "nobody")
    assert "nobody" in command.fails(4, "ls", "tour/nobody")


def test_show(command: Command, tour: list[str]) -> None:
    for place in (tour[2], "tour@3", "tour", "tour/main", "tour/main@3"):
        assert command.json("show", place)["snapshot_id"] == tour[2]
    assert command.json("show", "tour/other")["snapshot_id"] == tour[3]
    told = command.ok("show", tour[1])
    assert "tour/main, turn 2" in told
    assert "vram" in told
    shown = command.json("show", "tour@1", "--text")
    assert shown["text"] == "".join(f"<{token}>" for token in shown["fill_ids"])
    assert shown["text"] in command.ok("show", "tour@1", "--text").replace("\n", "")
    assert "neither a snapshot nor" in command.fails(4, "show", "nobody")
    assert "no turn 9" in command.fails(4, "show", "tour@9")


def test_a_time_that_no_calendar_has(command: Command, live: Live, tour: list[str]) -> None:
    far = 2.0**40
    live.run(live.server.service.change("", tour[0], expires_at=far))
    assert command.json("show", tour[0])["expires_at"] == far
    assert "after the year 9999" in command.ok("show", tour[0])


def test_a_snapshot_of_that_id_goes_before_the_conversation(command: Command, live: Live) -> None:
    live.chat("a")
    live.chat("b")
    command.ok("save", "a", "--id", "b")
    command.ok("save", "b")
    assert command.json("show", "b")["conversation_id"] == "a"
    assert command.json("show", "b/main")["conversation_id"] == "b"


def test_tree(command: Command, live: Live, tour: list[str]) -> None:
    lines = command.ok("tree", "tour").splitlines()
    assert lines[0] == "tour"
    places = [next(i for i, line in enumerate(lines) if name in line) for name in tour]
    # The branch stands below the turn it starts at, further in; turns of one branch line up.
    assert places == [1, 2, 4, 3]
    columns = [lines[place].index("turn") for place in places]
    assert columns[0] == columns[1] == columns[2] < columns[3]
    found = command.json("tree", "tour")
    assert [one["branch_name"] for one in found["branches"]] == ["main", "other"]


def test_save_says_what_was_saved(command: Command, live: Live) -> None:
    tokens = live.chat("c", turns=2)
    told = command.ok("save", "c", "--id", "named")
    assert "named: saved turn 2 of c/main" in told
    assert command.json("save", "c")["snapshot_id"] == "named"
    rid, _ = live.run(live.server.serve(tokens))
    adopted = command.json("save", "c", "--rid", rid)
    assert adopted["turn_number"] == 3
    assert "already_exists" in command.fails(1, "save", "c@1", "--id", "named", "--json")
    assert command.fails(2, "save")
    assert command.fails(2, "save", "c@1", "--rid", rid)


def test_restore(command: Command, live: Live, tour: list[str]) -> None:
    told = command.ok("restore", "tour@2")
    assert "restored turn 2 of tour/main" in told
    assert command.json("restore", tour[3])["branch_name"] == "other"
    for path in live.server.root.rglob("*.seg"):
        path.unlink()
    report = json.loads(command.fails(1, "restore", "tour@3", "--json"))
    assert report["error"] == "snapshot_corrupt"
    assert report["hint"]


def test_branch(command: Command, tour: list[str]) -> None:
    made = command.json("branch", "tour/other", "third", "--id", "named")
    assert (made["snapshot_id"], made["branch_name"], made["turn_number"]) == ("named", "third", 2)
    assert "elsewhere/main starts at turn 3" in command.ok(
        "branch", "tour", "--conversation", "elsewhere"
    )
    assert "already" in command.fails(1, "branch", "tour@1", "other")
    assert command.fails(2, "branch", "tour@1")


def test_rm(command: Command, live: Live, tour: list[str]) -> None:
    assert "--yes" in command.fails(2, "rm", tour[0])
    # What is called so is a conversation; it must be said that all of it is meant.
    assert command.fails(4, "rm", "tour", "-y")
    assert command.json("rm", tour[3], "tour@3", "-y")["snapshots"] == [tour[3], tour[2]]
    assert command.fails(4, "rm", tour[0], "tour@3", "-y")
    assert [one["snapshot_id"] for one in command.json("ls", "tour")["snapshots"]] == tour[:2]
    assert command.fails(2, "rm", "-r", "tour/main", "-y")
    assert "deleted 2" in command.ok("rm", "-r", "tour", "-y")
    assert command.json("ls")["conversations"] == []


def test_pin(command: Command, live: Live, tour: list[str]) -> None:
    assert command.json("pin", "tour@2")["pinned"] is True
    assert "pinned" in command.ok("ls", "tour").splitlines()[2]
    assert command.json("pin", "tour@2", "--off")["pinned"] is False
    assert command.json("pin", "tour", "--vram")["resident"] is True
    assert "tour/main" in command.ok("top", "--count", "1")
    assert command.json("pin", "tour", "--vram", "--off")["unpinned"] is True
    assert command.fails(2, "pin", "tour@2", "--vram")


def test_prefix(command: Command, tmp_path: Path) -> None:
    text = "Once upon a time"
    made = command.json("prefix", "add", "tale", "--text", text)
    assert (made["name"], made["token_count"]) == ("tale", len(text))
    (tmp_path / "manual").write_text("Page one")
    assert "manual: 8 tokens" in command.ok(
        "prefix", "add", "manual", "--text-file", str(tmp_path / "manual")
    )
    command.ok("prefix", "add", "guide", "--system", "You are a guide.")
    found = command.json("prefix", "ls")["prefixes"]
    assert [one["name"] for one in found] == ["guide", "manual", "tale"]
    assert "tale" in command.ok("prefix", "ls")
    assert "tale" in command.fails(1, "prefix", "add", "tale", "--text", "another")
    command.ok("prefix", "rm", "tale")
    assert command.fails(4, "prefix", "rm", "tale")
    assert command.fails(2, "prefix", "add", "x")
    (tmp_path / "bytes").write_bytes(b"\xff")
    assert command.fails(2, "prefix", "add", "x", "--text-file", str(tmp_path / "bytes"))


def test_diff(command: Command, live: Live) -> None:
    start = live.chat("a")
    one = live.chat("a", before=start)
    other = live.chat("b", before=start)
    for name in ("a", "b"):
        command.ok("save", name)
    found = command.json("diff", "a", "b", "--context", "3")
    assert found["common_tokens"] == len(start)
    assert found["common_end"] == "".join(f"<{token}>" for token in start[-3:])
    for report, tokens in zip(found["snapshots"], (one, other), strict=True):
        assert report["own_tokens"] == len(tokens) - len(start)
        assert report["own_text"] == "".join(f"<{token}>" for token in tokens[len(start) :])
    told = command.ok("diff", "a", "b")
    assert f"the first {len(start)} tokens are the same" in told
    assert "a/main@2" in told
    assert "are shared" in told
    assert "both have the same" in command.ok("diff", "a", "a")
    assert command.json("diff", "a", "a")["shared_bytes"] == found["snapshots"][0]["bytes"]


def test_explain(command: Command, live: Live) -> None:
    server = live.server
    gate = server.service.gate
    first = live.chat("c")
    sent = [*first[:4], 7, *first[5:], 8]
    rid, _ = live.run(server.serve(sent, Tag("c")))
    assert "nothing is known" in command.fails(4, "explain", rid)
    gate.served.cached(rid, 4, 1, 3)
    told = command.ok("explain", rid)
    assert f"4 of {len(sent)} tokens were cached" in told
    assert "1 of them were in VRAM, 3 were loaded from RAM" in told
    assert f"differs from turn 1 at token 4: '<{first[4]}>' ({first[4]}) was recorded" in told
    assert "'<7>' (7) was sent" in told
    found = command.json("explain", rid)
    assert found["earlier"]["difference"] == {"position": 4, "recorded": first[4], "sent": 7}
    command.ok("save", "c")
    assert command.json("explain", "c")["rid"] == rid
    command.ok("save", "c@1")
    assert "is saved, and covers" in command.ok("explain", rid)
    assert "nobody" in command.fails(4, "explain", "nobody")


def test_explain_a_prompt_that_goes_on(command: Command, live: Live) -> None:
    first = live.chat("c")
    rid, _ = live.run(live.server.serve([*first, 1, 2], Tag("c")))
    live.server.service.gate.served.cached(rid, len(first) - 1, len(first) - 1, 0)
    told = command.ok("explain", rid)
    assert f"the prompt begins with all {len(first)} tokens of turn 1" in told
    alone, _ = live.run(live.server.serve([1, 2, 3]))
    live.server.service.gate.served.cached(alone, 0, None, None)
    assert "no earlier turn" in command.ok("explain", alone)


def test_explain_says_what_was_fetched_from_disk(command: Command, live: Live) -> None:
    first = live.chat("c")
    command.ok("save", "c")
    live.run(live.server.service.context.engine())
    rid, _ = live.run(live.server.serve([*first, 1, 2], Tag("c")))
    live.server.service.gate.served.cached(rid, len(first) - 1, 0, len(first) - 1)
    found = command.json("explain", rid)
    assert (found["fetched_tokens"], found["fetched_from"]) == (len(first) - 1, "disk")
    assert "was brought from disk while the request waited" in command.ok("explain", rid)


def test_top(command: Command, live: Live, tour: list[str]) -> None:
    told = command.ok("top", "--count", "2", "--interval", "0.1")
    assert told.count("tier") == 2
    assert "4 snapshots, 1 conversations" in told
    assert "saves 4 (0 failed)" in told
    lines = command.ok("top", "--count", "2", "--interval", "0.1", "--json").splitlines()
    assert [json.loads(line)["tiers"]["disk"]["snapshots"] for line in lines] == [4, 4]


@pytest.mark.parametrize("words", [("ls",), ("show", "c"), ("top",), ("chat", "c", "-m", "hi")])
def test_nobody_answers(command: Command, words: tuple[str, ...]) -> None:
    assert UNREACHABLE in command.fails(3, *words, ENGRAM_URL=UNREACHABLE)
    report = json.loads(command.fails(3, *words, "--json", "--url", UNREACHABLE))
    assert report["error"] == "server_unreachable"
    assert report["hint"]


@pytest.mark.parametrize("name", ["ls", "show", "tree", "restore", "pin", "diff", "save", "chat"])
@pytest.mark.parametrize("place", ["../x", "a//b", "a@", "a@x", "a@-1", "@1", "", "a@" + "9" * 99])
def test_what_names_nothing(command: Command, name: str, place: str) -> None:
    words = [name, place, "tour"] if name == "diff" else [name, place]
    assert command.fails(2, *words, typed="")


def test_a_place_is_read() -> None:
    named = parse("a.b:c/d-e@12")
    assert (named.conversation_id, named.branch_name, named.turn) == ("a.b:c", "d-e", 12)
    assert not named.bare
    assert (parse("x").branch_name, parse("x").bare) == ("main", True)
    assert str(parse("x")) == "x/main"
    with pytest.raises(EngramError):
        parse("a@b@c")


def test_every_command_has_json_url_and_key(command: Command) -> None:
    for name in SERVER_COMMANDS:
        told = command.ok(name, "--help")
        for option in ("--json", "--url", "--api-key", "ENGRAM_URL", "ENGRAM_API_KEY"):
            assert option in told, (name, option)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_for_the_shells(command: Command, shell: str) -> None:
    variables = {
        "_ENGRAM_COMPLETE": f"source_{shell}",
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    result = CliRunner().invoke(app, [], env=variables, prog_name="engram")
    assert result.exit_code == 0, result.output
    assert "_ENGRAM_COMPLETE" in result.stdout


def test_ctrl_c_is_no_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("engram.cli.remote.watching.time.sleep", interrupt)
    result = command.run("top")
    assert result.exit_code == 130
    assert "Traceback" not in result.output
