"""What to keep: pure functions over plain data. Nothing here reads a clock, a file or a device.

========================  ==========================================================
to plan                   is in
========================  ==========================================================
which snapshots go        ``plan``, by the rules and the value of ``policy``
which conversations       ``demotion``
leave RAM
what removing one frees   ``forest``: segments are shared, chains of them
the data from manifests   ``inventory``
========================  ==========================================================
"""

from engram.retention.base import (
    Keep,
    Kept,
    Reason,
    Removal,
    RetentionPlan,
    RetentionPolicy,
    Segment,
    Snapshot,
)
from engram.retention.plan import plan

__all__ = [
    "Keep",
    "Kept",
    "Reason",
    "Removal",
    "RetentionPlan",
    "RetentionPolicy",
    "Segment",
    "Snapshot",
    "plan",
]
