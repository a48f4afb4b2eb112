"""Conversations: turns along a branch, branches from any turn.

| module | holds |
|---|---|
| `turns.py` | `Tag`, `Turn`, `FinishedRequest`: a request while it runs and after |
| `text.py` | recorded tokens in the place of text that would be tokenised again |
| `tracker.py` | `ConversationTracker`: counts the turns and remembers what is not saved yet |
"""
