"""The field types both formats are made of: strict, bounded, without coercion."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import ConfigDict, Field, Strict, ValidationError

from engram.core.canonical import HEX_DIGEST_PATTERN
from engram.core.ids import ID_PATTERN
from engram.core.tokens import MAX_TOKEN_ID

# Exact in every JSON reader, and far above any count of bytes or tokens.
MAX_COUNT: Final = 2**53 - 1

CLOSED: Final = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
"""Configuration of every model here: no unknown fields, no NaN, immutable."""

Count = Annotated[int, Strict(), Field(ge=0, le=MAX_COUNT)]
PositiveCount = Annotated[int, Strict(), Field(ge=1, le=MAX_COUNT)]
TokenId = Annotated[int, Strict(), Field(ge=0, le=MAX_TOKEN_ID)]
Flag = Annotated[bool, Strict()]
Digest = Annotated[str, Strict(), Field(pattern=HEX_DIGEST_PATTERN)]
Id = Annotated[str, Strict(), Field(pattern=ID_PATTERN)]
IdOrEmpty = Annotated[str, Strict(), Field(pattern=rf"^$|{ID_PATTERN}")]
Label = Annotated[str, Strict(), Field(max_length=4096)]
Seconds = Annotated[float, Strict(), Field(ge=0, le=MAX_COUNT)]


def first_problem(error: ValidationError) -> str:
    """``field.path: what is wrong`` of the first problem; values are never repeated."""
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = ".".join(str(part) for part in problem["loc"])
    return f"{path}: {problem['msg']}" if path else problem["msg"]
