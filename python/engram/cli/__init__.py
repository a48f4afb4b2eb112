"""The `engram` command.

| module | holds |
|---|---|
| `main.py` | the command and its subcommands |
| `doctor.py` | `engram doctor`: is this installation, and this store, as it should be |
| `store_health.py` | the store's part of that, read without changing anything |
"""
