"""Where the bytes of a segment are: in RAM, on disk; who moves them, and when.

| module | holds |
|---|---|
| `base.py` | the words of this room: `Segment`, `Tier`, the outcomes of moving one |
| `payload.py` | typed views of a payload, and its padding |
| `ram.py` | `RamTier`: the bounded host pool and the index over it |
| `twins.py` | rows that begin alike, so that what is common is stored once |
| `health.py` | whether a recurrent state is one |
| `writing.py` | `WriteQueue`: the writer's line, and what it holds in RAM |
| `planning.py` | `SegmentPlanner`: how the segments of a rank are laid out |
| `leases.py` | `Leases`: who may rely on a chain staying in RAM |
| `lookup.py` | `Lookup`: where a sequence can go on from |
| `capture.py` | `Capturer`: from the device pools into RAM |
| `persist.py` | `Persister`: from RAM to disk |
| `promote.py` | `Promoter`: from disk into RAM, verified |
| `manager.py` | `TierManager`: the front of all these, one for each rank |
"""
