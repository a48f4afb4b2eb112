"""Where the bytes of a segment are: in RAM, on disk; who moves them, and when.

| module | holds |
|---|---|
| `base.py` | the words of this room: `Boundary`, `Tier`, the outcomes of moving one |
| `ram.py` | `RamTier`: the bounded host pool and the boundary index over it |
| `manager.py` | `TierManager`: capture, persist, promote and drop on background threads |
"""
