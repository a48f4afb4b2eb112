"""The HTTP surface: FastAPI routers and their schemas.  Knows the service, not SGLang.

| module | holds |
|---|---|
| `schemas.py` | bodies and replies of the routes |
| `wire.py` | reading a bounded body, writing a reply or an error |
| `compatible.py` | the five routes of the published Engram fork |
| `tagging.py` | ASGI middleware: which conversation a generation request belongs to |
"""
