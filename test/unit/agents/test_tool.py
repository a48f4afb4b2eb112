"""The schema of a tool, and the check of its arguments."""

from typing import Any

import pytest

from engram.agents.tool import MARK, Tool, ToolContext, make_tool
from engram.errors import InvalidRequestError
from unit.agents import hostile_tools


def made(function: Any) -> Tool:
    found = getattr(function, MARK)
    assert isinstance(found, Tool)
    return found


def test_the_schema_comes_from_types_and_docstring() -> None:
    spec = made(hostile_tools.total).spec
    assert (spec.name, spec.description) == ("total", "Price of some orders.")
    assert (spec.tags, spec.timeout, spec.idempotent) == (("fine",), 20.0, True)
    assert spec.parameters["properties"] == {
        "orders": {
            "description": "what is bought, piece by piece.",
            "items": {"$ref": "#/$defs/Order"},
            "type": "array",
        },
        "price": {
            "description": "of one piece, in euros.",
            "exclusiveMinimum": 0,
            "type": "number",
        },
        "copy": {"default": False, "type": "boolean"},
    }
    assert spec.parameters["required"] == ["orders", "price"]
    assert spec.parameters["additionalProperties"] is False
    assert spec.as_function()["function"]["name"] == "total"


def test_a_tool_is_still_the_function() -> None:
    order = hostile_tools.Order(article="a", pieces=3)
    assert hostile_tools.total([order], 2.0) == 6.0


def test_arguments_become_what_the_types_say() -> None:
    bound = made(hostile_tools.total).bind(
        {"orders": [{"article": "a", "pieces": 2}], "price": 1}, ToolContext()
    )
    assert bound == {
        "orders": [hostile_tools.Order(article="a", pieces=2)],
        "price": 1.0,
        "copy": False,
    }


def test_the_context_is_in_no_schema() -> None:
    tool = made(hostile_tools.steps)
    assert tool.spec.parameters.get("properties", {}) == {}
    context = ToolContext(call_id="c")
    assert tool.bind({}, context) == {"context": context}
    with pytest.raises(InvalidRequestError, match="context"):
        tool.bind({"context": {}}, context)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"orders": [], "price": 0}, "price"),
        ({"orders": [], "price": 1, "extra": 1}, "extra"),
        ({"orders": [{"pieces": 1}], "price": 1}, "orders.0.article"),
        ({"price": 1}, "orders"),
    ],
)
def test_unfit_arguments_name_their_field(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        made(hostile_tools.total).bind(arguments, ToolContext())
    assert raised.value.details["field"] == field


def untyped(x):  # type: ignore[no-untyped-def] # what is tested
    return x


def starred(*parts: int) -> int:
    return len(parts)


def unfit(x: type(iter([]))) -> None:  # type: ignore[valid-type] # what is tested
    return None


@pytest.mark.parametrize("function", [untyped, starred, unfit])
def test_a_function_without_a_schema_is_refused(function: Any) -> None:
    with pytest.raises(ValueError, match=function.__name__):
        make_tool(function)


def test_names_and_timeouts_are_checked() -> None:
    with pytest.raises(ValueError, match="name"):
        make_tool(hostile_tools.pid, name="two words")
    with pytest.raises(ValueError, match="timeout"):
        make_tool(hostile_tools.pid, timeout=0)
