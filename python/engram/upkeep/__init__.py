"""What is done to a store as a whole: verify it, collect what nobody names, carry snapshots away.

| module | holds |
|---|---|
| `collect.py` | which segment files nothing names (pure), and their removal from a store at rest |
| `exporting.py` | snapshots -> one portable file |
| `importing.py` | one portable file -> snapshots |
| `check.py` | is every file of a store what it should be, and does all fit together |
| `findings.py` | what that found |
| `catalogs.py` | does a catalog say what the manifests say |

A server does the same through its service, which knows which saves are under way.
"""
