"""The HTTP surface: FastAPI routers and their schemas.  Knows the service, not SGLang.

| module | holds |
|---|---|
| `schemas.py` | bodies and replies of the routes |
| `wire.py` | reading a bounded body, writing a reply or an error |
| `compatible.py` | the five routes of the published Engram fork |
| `explaining.py` | where two snapshots part, and why so much of a prompt was cached |
| `resources.py` | `PATCH` on snapshots and conversations |
| `memory.py` | what the tiers hold and what was done, for operators; promote, demote, pin |
| `agent.py`, `agent_socket.py`, `agent_schemas.py` | `/v1/agent/*`, its WebSocket |
| `origins.py` | refuses pages of other sites |
| `refusing.py` | ASGI middleware: routes of SGLang that would falsify stored states |
| `tool_calls.py` | ASGI middleware: which replies contain tool calls |
| `tagging.py` | ASGI middleware: which conversation a generation request belongs to |
"""
