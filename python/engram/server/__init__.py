"""The HTTP surface: FastAPI routers and their schemas.  Knows the service, not SGLang.

| module | holds |
|---|---|
| `schemas.py` | bodies and replies of the routes |
| `wire.py` | reading a bounded body, writing a reply or an error |
| `compatible.py` | the five routes of the published Engram fork |
| `browsing.py` | conversations and snapshots as resources, all but `PATCH` |
| `metadata.py`, `outcomes.py` | a snapshot, a save and a restore as replies describe them |
| `resources.py` | `PATCH` on snapshots and conversations |
| `memory.py` | what the tiers hold and what was done, for operators; promote, demote, pin |
| `refusing.py` | ASGI middleware: routes of SGLang that would falsify stored states |
| `tool_calls.py` | ASGI middleware: which replies contain tool calls |
| `tagging.py` | ASGI middleware: which conversation a generation request belongs to |
"""
