"""The service: the only owner of write order, and of what a request and a route can ask.

| module | holds |
|---|---|
| `ports.py` | what the service needs of the engine: ranks that hold bytes, a generator of replies |
| `results.py` | the outcomes of save and restore, and the service's counters |
| `context.py` | what all parts of the service share |
| `boundaries.py` | `BoundaryIndex`: at which page keys a boundary is on disk |
| `requests.py` | `RequestGate`: holds a request until its prefix is in RAM, counts its turn |
| `triggers.py` | pure: which finished turns are saved by themselves, and when |
| `automatic.py` | carries the triggers out |
| `queue.py` | `SaveQueue`: few saves write at once, the others wait |
| `finder.py` | which turn a save means |
| `guard.py` | saves together, deletions alone |
| `saves.py` | `TurnSaver`: segments, manifest, catalog, in that order |
| `removals.py` | `Remover`: manifest, catalog, segments, in that order; by request and by plan |
| `changes.py` | `SnapshotChanger`: pin, expiry and metadata of what is saved |
| `conversations.py` | when conversations were used, and what they are worth |
| `housekeeping.py` | `Housekeeper`: plans and removes in the background, makes room for saves |
| `quota.py` | `DiskQuota`: bytes on disk, and those that saves will write |
| `demotion.py` | `Demoter`: who leaves the ranks' RAM |
| `pins.py` | `VramPinner`: who stays in VRAM |
| `restores.py` | `Restorer`: a snapshot into RAM, and the generation that continues it |
| `recorded.py` | `Recorded`: the tokens that stateful requests go on from |
| `linking.py` | `PrefixLinks`: which conversation a chat goes on that names none |
| `prefixes.py` | `PrefixKeeper`: beginnings of prompts, computed once |
| `transfer.py` | `Transfer`: snapshots to one file and back |
| `snapshots.py` | `SnapshotService`: the whole |
"""

from engram.service.snapshots import SnapshotService

__all__ = ["SnapshotService"]
