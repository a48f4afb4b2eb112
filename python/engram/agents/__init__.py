"""Agents: tools, what they remember, and the loop that lets a model use them.

| module | holds |
|---|---|
| `tool.py` | `@tool`: a function with a schema |
| `worker.py`, `framing.py`, `pool.py` | processes in which an operator's tools run |
| `execution.py` | one way to run any tool |

Whoever writes tools needs only `tool` and `ToolContext`; both load without the rest.
"""

from engram.agents.tool import ToolContext, tool

__all__ = ["ToolContext", "tool"]
