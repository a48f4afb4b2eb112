"""Conversations: turns along a branch, branches from any turn.

| module | holds |
|---|---|
| `turns.py` | `Tag`, `Turn`, `FinishedRequest`: a request while it runs and after |
| `tracker.py` | `ConversationTracker`: counts the turns and remembers what is not saved yet |
"""
