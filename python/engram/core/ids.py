"""Conversation, snapshot, branch and tenant ids.

An id is a label a user chose or we generated. It is compared, shown and hashed, never used as a
path.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Final

from engram.errors import InvalidIdError

MAX_ID_LENGTH: Final = 255
# Also used by the manifest's decoder; its regex engine knows no look-ahead, hence the two classes.
ID_PATTERN: Final = rf"^[A-Za-z0-9_:-][A-Za-z0-9._:-]{{0,{MAX_ID_LENGTH - 1}}}$"
DEFAULT_BRANCH: Final = "main"
DEFAULT_TENANT: Final = ""

_ID = re.compile(ID_PATTERN.removeprefix("^").removesuffix("$"), re.ASCII)
# Crockford's base 32: in ASCII order, without the letters that look like digits.
_BASE32: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_TIME_BITS: Final = 50  # milliseconds; enough until the year 37,000
_RANDOM_BITS: Final = 80


def check_id(field: str, value: object) -> str:
    """``value`` if it is a valid id; `InvalidIdError` naming ``field`` otherwise."""
    if isinstance(value, str) and _ID.fullmatch(value):
        return value
    raise InvalidIdError(
        f"{field} is not a valid id: {_shown(value)}",
        hint=f"1 to {MAX_ID_LENGTH} of A-Z a-z 0-9 . _ : - and no leading dot",
        details={"field": field},
    )


def check_tenant(value: object) -> str:
    """A tenant id, or the empty string for the tenant of servers that have none."""
    return DEFAULT_TENANT if value == DEFAULT_TENANT else check_id("tenant", value)


def new_snapshot_id(now: float | None = None) -> str:
    """``snap-`` and 26 base-32 characters: 50 bits of milliseconds, then 80 random bits.

    Ids made in different milliseconds sort by time. ``now`` is in seconds since the epoch.
    """
    milliseconds = int((time.time() if now is None else now) * 1000) & ((1 << _TIME_BITS) - 1)
    number = milliseconds << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
    digits = (number >> shift & 31 for shift in range(_TIME_BITS + _RANDOM_BITS - 5, -1, -5))
    return "snap-" + "".join(_BASE32[digit] for digit in digits)


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
