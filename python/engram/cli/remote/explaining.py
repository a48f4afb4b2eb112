"""`engram explain`: why so many tokens of a request were cached."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from engram.cli.remote.connection import URL, JsonOption, KeyOption, UrlOption, answer, connected
from engram.cli.remote.connection import console as new_console
from engram.cli.remote.places import parse, snapshot_at
from engram.client import EngramClient
from engram.client.results import Explanation
from engram.errors import EngramError, InvalidIdError, NotFoundError

IdArgument = Annotated[
    str,
    typer.Argument(metavar="ID", help="The id of a reply, or what names a snapshot."),
]


def explain(
    name: IdArgument,
    url: UrlOption = URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say why so many tokens of a turn's prompt were cached."""
    with connected(url, api_key, as_json) as client:
        found = _found(client, name)
        texts = _texts(client, found)
        if as_json:
            report: dict[str, Any] = found.model_dump(mode="json")
            answer(report | {"texts": texts, "because": because(found, texts)}, True)
            return
        console = new_console()
        place = "a request of no conversation"
        if found.conversation_id is not None:
            turn = "" if found.turn_number is None else f", turn {found.turn_number}"
            place = f"{found.conversation_id}/{found.branch_name}{turn}"
        console.print(f"[bold]{escape(place)}[/] [dim]{escape(found.rid)}[/]")
        console.print(f"{found.cached_tokens:,} of {found.prompt_tokens:,} tokens were cached")
        for line in because(found, texts):
            console.print(f"- {escape(line)}")


def _found(client: EngramClient, name: str) -> Explanation:
    """The request of that id, else the one that the snapshot of that name was."""
    try:
        return client.explain(name)
    except NotFoundError as unknown:
        try:
            parse(name)
            rid = snapshot_at(client, name).rid
        except (NotFoundError, InvalidIdError):
            raise unknown from None
        if rid is None:
            raise
        return client.explain(rid)


def _texts(client: EngramClient, found: Explanation) -> dict[str, str]:
    """The tokens that differ, as text."""
    difference = found.earlier.difference if found.earlier else None
    if difference is None:
        return {}
    try:
        recorded, sent = client.texts([[difference.recorded], [difference.sent]])
    except EngramError:
        # A server without a tokenizer has no texts; the ids say as much.
        return {}
    return {"recorded": recorded, "sent": sent}


def because(found: Explanation, texts: dict[str, str]) -> list[str]:
    """The reasons, one a line."""
    lines = []
    if found.vram_tokens is not None and found.ram_tokens is not None and found.cached_tokens:
        lines.append(
            f"{found.vram_tokens:,} of them were in VRAM, {found.ram_tokens:,} were loaded from RAM"
        )
    if found.fetched_tokens and found.fetched_from is not None:
        lines.append(
            f"the stored boundary at token {found.fetched_tokens:,} was brought from "
            f"{found.fetched_from} while the request waited"
        )
    if found.problem is not None:
        lines.append(f"a stored prefix could not be used: {found.problem}")
    earlier = found.earlier
    if earlier is None:
        lines.append("there is no earlier turn that it goes on from")
        return lines
    turn = f"turn {earlier.turn_number}"
    if earlier.difference is None:
        lines.append(f"the prompt begins with all {earlier.common_tokens:,} tokens of {turn}")
        if earlier.common_tokens < earlier.tokens:
            lines.append(f"{turn} has {earlier.tokens:,} tokens: the prompt ends inside it")
    else:
        place = earlier.difference.position
        recorded = _shown(earlier.difference.recorded, texts.get("recorded"))
        sent = _shown(earlier.difference.sent, texts.get("sent"))
        lines.append(
            f"the prompt differs from {turn} at token {place:,}: {recorded} was recorded, {sent} "
            "was sent"
        )
    if earlier.token_count is not None:
        lines.append(f"the state of {turn} is saved, and covers {earlier.token_count:,} tokens")
    return lines


def _shown(token: int, text: str | None) -> str:
    return f"token {token}" if text is None else f"{text!r} ({token})"
