"""Agents: tools, what they remember, and the loop that lets a model use them.

| module | holds |
|---|---|
| `tool.py` | `@tool`: a function with a schema |
| `worker.py`, `framing.py`, `pool.py` | processes in which an operator's tools run |
| `execution.py` | one way to run any tool, for so long at most |
| `built_in.py`, `calculator.py` | the tools every server has |
| `database.py` | the SQLite file of what follows |
| `memory.py` | what agents keep |
| `owners.py` | whose that is: what an API key stands for, and how it is handed on |
| `journal.py` | what runs did, written before and after each thing they do |
| `requests.py`, `loop.py`, `runs.py` | what a run is asked for, its loop, all runs |
| `ports.py`, `continuing.py` | what is needed of the engine; going on from the tokens of a reply |
| `events.py` | who hears of what |
| `mcp_server.py`, `mcp_bridge.py` | MCP, over HTTP and over standard input and output |
| `host.py` | all of it, put together |

Whoever writes tools needs only `tool` and `ToolContext`; both load without the rest.
"""

from engram.agents.tool import ToolContext, tool

__all__ = ["ToolContext", "tool"]
