"""Where the bytes of a segment are: in RAM, on disk; who moves them, and when.

| module | holds |
|---|---|
| `base.py` | the words of this room: `Segment`, `Tier`, the outcomes of moving one |
| `payload.py` | typed views of a payload, and its padding |
| `ram.py` | `RamTier`: the bounded host pool and the index over it |
| `twins.py` | rows that begin alike, so that what is common is stored once |
| `health.py` | whether a recurrent state is one |
| `writing.py` | `WriteQueue`: the writer's line, and what it holds in RAM |
| `manager.py` | `TierManager`: capture, persist, promote and drop on background threads |
"""
