"""The `engram` command.

| module | holds |
|---|---|
| `main.py` | the command and its subcommands |
| `doctor.py` | `engram doctor`: is this installation, and this store, as it should be |
| `store_health.py` | the store's part of that, read without changing anything |
| `fsck.py` | `engram fsck`: is every byte of a store what it should be |
| `gc.py` | `engram gc`: what no snapshot names |
| `transfer.py` | `engram export`, `engram import` |
| `retention.py` | `engram retention`: what a policy would remove |
| `size.py` | `engram size`: what a model's snapshots cost |
| `remote/` | the commands that talk to a running server |
| `options.py`, `failing.py` | what commands share |
"""
