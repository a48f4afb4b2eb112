"""Tools of the server that the tests of agents look at."""

import os
import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from shop_tools import price as price  # the document's, as its reader has it

from engram.agents import ToolContext, tool

Digit = Annotated[int, Field(ge=0, le=9)]
FOLDER = Path(os.environ["ENGRAM_TEST_TOOLS"])
"""`counts` has a line for every time something was counted; what is gated waits for `gate`."""


def _count(context: ToolContext) -> None:
    """Count a call once, whether or not it is made again after a crash."""
    counts = FOLDER / "counts"
    known = counts.read_text().splitlines() if counts.exists() else []
    if context.call_id not in known:
        with counts.open("a") as file:
            file.write(context.call_id + "\n")
            file.flush()
            os.fsync(file.fileno())


@tool
def count(context: ToolContext, by: Digit) -> dict[str, int]:
    """Count, with no care for repetition."""
    with (FOLDER / "counts").open("a") as file:
        file.write(context.call_id + "\n")
        file.flush()
        os.fsync(file.fileno())
    return {"counted": by}


@tool(timeout=600.0, idempotent=True)
def gated(context: ToolContext, part: Digit) -> dict[str, int]:
    """Count, once however often a call is made, and wait for the gate."""
    _count(context)
    (FOLDER / "gated").touch()
    while not (FOLDER / "gate").exists():
        time.sleep(0.02)
    return {"part": part}


@tool(timeout=600.0)
def careless(context: ToolContext, part: Digit) -> dict[str, int]:
    """Count, wait for the gate, and must not be repeated."""
    with (FOLDER / "counts").open("a") as file:
        file.write(context.call_id + "\n")
    (FOLDER / "gated").touch()
    while not (FOLDER / "gate").exists():
        time.sleep(0.02)
    return {"part": part}


@tool(tags=["paint"])
async def paint(colour: Literal["red", "blue"]) -> str:
    """Paint something."""
    return f"painted {colour}"


@tool
def report(context: ToolContext, steps: Digit = 3) -> dict[str, str | None]:
    """Report progress."""
    for step in range(steps):
        context.progress(step / max(steps, 1), f"step {step}")
    return {"conversation_id": context.conversation_id}


@tool
def shout() -> str:
    """Say much."""
    return "!" * (1 << 19)


@tool(timeout=1.0)
def hang() -> None:
    """Never end."""
    time.sleep(600)


@tool
def misbehave(how: Literal["raise", "large", "fork", "exit", "write"]) -> str:
    """Do what tools should not do."""
    if how == "raise":
        raise RuntimeError("no bread")
    if how == "large":
        return "x" * (50 << 20)
    if how == "fork":
        return "child" if os.fork() == 0 else "parent"
    if how == "exit":
        os._exit(3)
    os.write(1, b"written past everything\n" * 1000)
    return how
