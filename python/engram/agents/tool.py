"""What a tool is: a function with a schema, and what an agent needs to know of it.

The schema comes from the type hints and the docstring, the check of arguments from pydantic::

    @tool(tags=["shop"], timeout=5.0)
    def price(article: str, pieces: Annotated[int, Field(ge=1)] = 1) -> float:
        '''Price of an article in euros.

        Args:
            article: its number in the catalogue.
            pieces: how many.
        '''
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError

from engram.errors import InvalidRequestError

NAME_PATTERN: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}", re.ASCII)
"""What the OpenAI protocol takes for the name of a function."""
MARK: Final = "__engram_tool__"
MAX_DESCRIPTION: Final = 4096

Function = TypeVar("Function", bound=Callable[..., Any])
OnProgress = Callable[[float, str], None]
"""Told how far a tool is, from 0 to 1, and in words what it does."""


@dataclass(frozen=True)
class ToolContext:
    """Who calls a tool.  A parameter with this annotation is given it, and is in no schema.

    `call_id` is the same when a call is repeated after a crash: a tool whose work is not
    idempotent by nature can keep it with what it does.
    """

    call_id: str = ""
    owner: str = ""
    conversation_id: str | None = None
    run_id: str | None = None
    on_progress: OnProgress = field(default=lambda fraction, message: None, repr=False)

    def progress(self, fraction: float, message: str = "") -> None:
        """Say that `fraction` of the work is done, from 0 to 1."""
        self.on_progress(min(max(float(fraction), 0.0), 1.0), str(message)[:1000])


class ToolSpec(BaseModel):
    """A tool as it is shown: to models, clients and over the way from a worker.

    `timeout` is in seconds, None for the server's; `parameters` a JSON schema.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    description: str
    parameters: dict[str, Any]
    tags: tuple[str, ...] = ()
    timeout: float | None = None
    idempotent: bool = False
    isolated: bool = True

    def as_function(self) -> dict[str, Any]:
        """The tool in the form of the OpenAI protocol."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Tool:
    """A function with its spec and the model that checks its arguments."""

    spec: ToolSpec
    function: Callable[..., Any]
    arguments: type[BaseModel]
    names: Mapping[str, str]
    """Parameters -> the fields of `arguments` that hold them."""
    context_parameter: str | None

    def bind(self, arguments: Mapping[str, Any], context: ToolContext) -> dict[str, Any]:
        """The keyword arguments of a call.  `InvalidRequestError` naming the parameter."""
        try:
            checked = self.arguments.model_validate(dict(arguments))
        except ValidationError as error:
            problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part) for part in problem["loc"])[:200]
            raise InvalidRequestError(
                f"{self.spec.name}: {where}: {problem['msg']}",
                hint="the tool's parameters are in its schema",
                details={"field": where, "tool": self.spec.name},
            ) from None
        bound = {name: getattr(checked, place) for name, place in self.names.items()}
        if self.context_parameter is not None:
            bound[self.context_parameter] = context
        return bound


@overload
def tool(function: Function, /) -> Function: ...


@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    tags: typing.Iterable[str] = (),
    timeout: float | None = None,
    idempotent: bool = False,
) -> Callable[[Function], Function]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    tags: typing.Iterable[str] = (),
    timeout: float | None = None,
    idempotent: bool = False,
) -> Any:
    """Make a function, sync or async, a tool; it can still be called as before.

    `timeout` is in seconds; `idempotent` says that repeating a call does no harm, so that a run
    whose server was killed in the middle of it may do so.  Raises ValueError for a function that
    has no schema: a parameter without a type, `*args`, an unfit name.
    """

    def mark(target: Callable[..., Any]) -> Callable[..., Any]:
        made = make_tool(
            target,
            name=name,
            description=description,
            tags=tags,
            timeout=timeout,
            idempotent=idempotent,
        )
        setattr(target, MARK, made)
        return target

    return mark if function is None else mark(function)


def make_tool(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    description: str | None = None,
    tags: typing.Iterable[str] = (),
    timeout: float | None = None,
    idempotent: bool = False,
    isolated: bool = True,
) -> Tool:
    """The tool that a function is.  Raises ValueError as `tool` does."""
    called = name if name is not None else str(getattr(function, "__name__", ""))
    if not NAME_PATTERN.fullmatch(called):
        raise ValueError(f"{called!r} cannot be the name of a tool: {NAME_PATTERN.pattern}")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"{called}: the timeout must be positive")
    about, of_parameters = _docstring(inspect.getdoc(function) or "")
    fields, names, context_parameter = _fields(function, called, of_parameters)
    try:
        arguments = create_model(
            f"{called}_arguments", __config__=ConfigDict(extra="forbid"), **fields
        )
        parameters = arguments.model_json_schema()
    except PydanticUserError as error:
        raise ValueError(f"{called}: no schema: {error}") from error
    spec = ToolSpec(
        name=called,
        description=(description or about)[:MAX_DESCRIPTION],
        parameters=_untitled(parameters),
        tags=tuple(tags),
        timeout=timeout,
        idempotent=idempotent,
        isolated=isolated,
    )
    return Tool(spec, function, arguments, names, context_parameter)


def _fields(
    function: Callable[..., Any], called: str, of_parameters: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str], str | None]:
    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    names: dict[str, str] = {}
    context_parameter = None
    for number, parameter in enumerate(inspect.signature(function).parameters.values()):
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"{called}: {parameter} cannot be given by name")
        if parameter.name not in hints:
            raise ValueError(f"{called}: parameter {parameter.name} has no type")
        if hints[parameter.name] is ToolContext:
            context_parameter = parameter.name
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        # A field's own name may be one that pydantic uses itself, such as copy or json.
        place = names[parameter.name] = f"argument_{number}"
        about = of_parameters.get(parameter.name)
        # Left out where the docstring is silent: a description of the annotation's own stands.
        described = {} if about is None else {"description": about}
        made = Field(default, alias=parameter.name, **described)  # type: ignore[call-overload]
        fields[place] = (hints[parameter.name], made)
    return fields, names, context_parameter


_SECTION: Final = re.compile(r"^(\w+):\s*$", re.MULTILINE)
_PARAMETERS: Final = ("Args", "Arguments", "Parameters")


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """What is said of the function, and of each parameter under ``Args:``."""
    about, *rest = _SECTION.split(text)
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    found: dict[str, str] = {}
    current = None
    for line in next((sections[name] for name in _PARAMETERS if name in sections), "").splitlines():
        match = re.match(r"\s+(\w+)(?: \([^)]*\))?: (.*)", line)
        if match:
            current = match[1]
            found[current] = match[2].strip()
        elif current is not None and line.strip():
            found[current] += " " + line.strip()
    return about.strip(), found


def _untitled(schema: Any) -> Any:
    """A schema without the titles pydantic makes up, which cost a model tokens and say nothing."""
    if isinstance(schema, list):
        return [_untitled(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: _untitled(one) for name, one in value.items()}
        if key in ("properties", "$defs") and isinstance(value, dict)
        else _untitled(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
    }
