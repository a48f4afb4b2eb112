"""What a client asks of an agent run."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict

from engram.core.ids import check_id
from engram.errors import InvalidIdError

MAX_MESSAGES: Final = 10_000
MAX_TOOLS: Final = 128
MAX_CHOICES: Final = 100
MAX_BRANCHES: Final = 16
"""Of one exploration."""
MAX_DEPTH: Final = 100
"""Of lists and objects in one another, in what is passed on to the engine; pydantic writes 255."""


def _id(value: str) -> str:
    try:
        return check_id("id", value)
    except InvalidIdError as error:
        raise ValueError(error.hint) from None


Id = Annotated[str, Strict(), AfterValidator(_id)]


def _shallow(value: Any, left: int = MAX_DEPTH) -> Any:
    if not left:
        raise ValueError(f"more than {MAX_DEPTH} lists and objects in one another")
    inner = value.values() if isinstance(value, dict) else value
    for one in inner:
        if isinstance(one, (dict, list)):
            _shallow(one, left - 1)
    return value


Json = Annotated[dict[str, Any], AfterValidator(_shallow)]


class NamedFunction(BaseModel):
    """The name inside a tool choice."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=64)]


class NamedChoice(BaseModel):
    """A tool choice that names the tool to call."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"] = "function"
    function: NamedFunction


Choice = Literal["auto", "required", "none"] | NamedChoice


class Beginning(BaseModel):
    """The recorded turn that a run goes on from.

    What is left out: the run's own conversation, the branch `main`, its newest turn.
    """

    model_config = ConfigDict(extra="forbid")

    conversation_id: Id | None = None
    branch_name: Id | None = None
    turn_number: Annotated[int, Strict(), Field(ge=1, lt=2**63)] | None = None


class RunTask(BaseModel):
    """What a run is to do, wherever it begins.

    `tool_choice` may be a list: one choice for each reply, the last for all that follow. `tools`
    are names, none for all; what is left out of the limits is what the server's flags say.
    """

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[list[Json], Field(min_length=1, max_length=MAX_MESSAGES)]
    tools: Annotated[list[str], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Choice | Annotated[list[Choice], Field(min_length=1, max_length=MAX_CHOICES)] = (
        "auto"
    )
    parallel_tool_calls: bool = True
    max_iterations: Annotated[int, Strict(), Field(ge=1)] | None = None
    max_tool_calls_per_iteration: Annotated[int, Strict(), Field(ge=1)] | None = None
    checkpoint: Annotated[bool, Strict()] = True
    model: Annotated[str, Field(max_length=255)] | None = None
    max_tokens: Annotated[int, Strict(), Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**63)] | None = None
    response_format: Json | None = None

    def choice(self, step: int) -> str | dict[str, Any]:
        """The tool choice of reply number `step`, the first being 0."""
        given = self.tool_choice
        one = given[min(step, len(given) - 1)] if isinstance(given, list) else given
        return one if isinstance(one, str) else one.model_dump()

    def sampling(self) -> dict[str, Any]:
        """The fields that go into every request for a reply."""
        names = ("model", "max_tokens", "temperature", "top_p", "seed")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class RunRequest(RunTask):
    """`POST /v1/agent/runs`.

    With `continue_from` the messages are only what is new: the run goes on from the tokens of that
    turn. `branch_name` is the branch that its replies are turns of, `main` if left out.
    """

    conversation_id: Id | None = None
    branch_name: Id | None = None
    continue_from: Beginning | None = None


class ExploreRequest(BaseModel):
    """`POST /v1/agent/explorations`: several runs from one turn, each on a branch of its own.

    The turn is the one of `turn_number`, the newest if left out, of `branch_name`, `main` if left
    out.
    """

    model_config = ConfigDict(extra="forbid")

    conversation_id: Id
    branch_name: Id | None = None
    turn_number: Annotated[int, Strict(), Field(ge=1, lt=2**63)] | None = None
    branches: Annotated[list[RunTask], Field(min_length=2, max_length=MAX_BRANCHES)]


class KeepBody(BaseModel):
    """`POST /v1/agent/explorations/{exploration_id}/keep`."""

    model_config = ConfigDict(extra="forbid")

    branch_name: Id


class ResumeBody(BaseModel):
    """`POST /v1/agent/runs/{run_id}/resume`.

    `unknown_calls` says what to do with calls whose outcome is not known: ``report`` tells the
    model so, ``repeat`` calls the tool again.
    """

    model_config = ConfigDict(extra="forbid")

    unknown_calls: Literal["report", "repeat"] = "report"
