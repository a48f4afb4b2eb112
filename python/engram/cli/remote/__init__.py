"""Commands that talk to a running server.

| module | holds |
|---|---|
| `connection.py` | `--url`, `--api-key`, and how these commands end |
| `places.py` | what names a snapshot: an id, or CONVERSATION[/BRANCH][@TURN] |
| `looking.py` | `engram ls`, `show`, `tree` |
| `changing.py` | `engram save`, `restore`, `branch`, `rm`, `pin` |
| `naming.py` | `engram prefix` |
| `comparing.py` | `engram diff` |
| `explaining.py` | `engram explain` |
| `watching.py` | `engram top` |
| `talking.py` | `engram chat` |
| `tables.py` | how snapshots, sizes and times are shown |
"""
