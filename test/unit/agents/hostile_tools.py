"""Tools that do to their process what tools should not do; and some that are well behaved."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from engram.agents import ToolContext, tool


class Order(BaseModel):
    article: str
    pieces: int = 1


@tool(tags=["fine"], timeout=20.0, idempotent=True)
def total(orders: list[Order], price: Annotated[float, Field(gt=0)], copy: bool = False) -> float:
    """Price of some orders.

    Args:
        orders: what is bought,
            piece by piece.
        price: of one piece, in euros.
    """
    return sum(order.pieces for order in orders) * price * (2 if copy else 1)


@tool(tags=["fine"])
async def later(word: Literal["red", "blue"]) -> dict[str, str]:
    """Answer after a moment."""
    await asyncio.sleep(0)
    return {"word": word}


@tool
def steps(context: ToolContext) -> dict[str, object]:
    """Say how far it is."""
    for step in range(3):
        context.progress(step / 2, f"step {step}")
    return {"conversation": context.conversation_id, "call": context.call_id}


@tool
def pid() -> int:
    """Its process."""
    return os.getpid()


@tool(timeout=0.5)
def hang(with_child: bool = False) -> int:
    """Never end."""
    if with_child:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    while True:
        time.sleep(1)


@tool
def fail(message: str) -> None:
    """Raise."""
    raise RuntimeError(message)


@tool
def odd_name(context: ToolContext) -> None:
    """Say the name of a file as Python makes it of one that is no UTF-8."""
    context.progress(0.5, "odd \udce9")
    raise RuntimeError("odd \udce9")


@tool
def large(size: int) -> str:
    """Return much."""
    return "x" * size


@tool
def no_json() -> object:
    """Return what is no JSON."""
    return object()


@tool
def fork() -> str:
    """Fork, and come back twice."""
    return "child" if os.fork() == 0 else "parent"


@tool
def leave_child(folder: str) -> int:
    """Start a process that survives, in a session of its own, with the tool long gone."""
    code = (
        "import os, sys, time\n"
        "if os.fork(): sys.exit()\n"
        "os.setsid()\n"
        f"open({folder!r} + '/pid', 'w').write(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    path = Path(folder, "pid")
    while not path.exists() or not path.read_text():
        time.sleep(0.01)
    return int(path.read_text())


@tool
def leave_thread() -> int:
    """Start a thread that goes on."""
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return os.getpid()


@tool
def leave(status: int, hard: bool) -> None:
    """Call exit."""
    if hard:
        os._exit(status)
    sys.exit(status)


@tool
def write(text: str, times: int = 1) -> str:
    """Write to the standard output and error."""
    for _ in range(times):
        sys.stdout.write(text + "\n")
    sys.stderr.write("error\n")
    return "written"


@tool
def raw_write(text: str) -> str:
    """Write past Python."""
    os.write(1, text.encode())
    return "written"


@tool
def close_all() -> str:
    """Close every file there is, the connection to the server among them."""
    os.closerange(0, 256)
    return "closed"
