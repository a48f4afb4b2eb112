"""The HTTP surface: FastAPI routers and their schemas.  Knows the service, not SGLang.

| module | holds |
|---|---|
| `schemas.py` | bodies and replies of the routes |
| `wire.py` | reading a bounded body, writing a reply or an error |
| `compatible.py` | the five routes of the published Engram fork |
| `memory.py` | what the subsystem has done, for operators |
| `refusing.py` | ASGI middleware: routes of SGLang that would falsify stored states |
| `tagging.py` | ASGI middleware: which conversation a generation request belongs to |
"""
