"""Arithmetic on text, without `eval`: a few kinds of syntax, and bounds on each step.

What is bounded is the size of numbers before they are computed, so that no expression takes long:
each step is on at most `MAX_BITS` bits, and an expression has at most `MAX_LENGTH` characters.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

from engram.errors import InvalidRequestError

Number = int | float

MAX_LENGTH: Final = 1_000
MAX_BITS: Final = 8_192
MAX_DEPTH: Final = 100
MAX_FACTORIAL: Final = 800
"""800! has about 6,600 bits."""

_BINARY: Final[Mapping[type[ast.operator], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: Final[Mapping[type[ast.unaryop], Callable[[Any], Any]]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
CONSTANTS: Final = {"pi": math.pi, "e": math.e, "tau": math.tau}


def _factorial(number: Number) -> Number:
    if not isinstance(number, int) or not 0 <= number <= MAX_FACTORIAL:
        raise _refused(f"factorial is of whole numbers from 0 to {MAX_FACTORIAL}")
    return math.factorial(number)


def _round(number: Number, digits: Number = 0) -> Number:
    if not isinstance(digits, int) or abs(digits) > 100:
        raise _refused("round takes at most 100 digits")
    return round(number, digits) if digits else round(number)


FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": _round,
    "factorial": _factorial,
    **{
        name: getattr(math, name)
        for name in (
            *("sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tan", "asin", "acos", "atan"),
            *("atan2", "sinh", "cosh", "tanh", "floor", "ceil", "trunc", "hypot", "degrees"),
            *("radians", "gcd"),
        )
    },
}


def calculate(expression: str) -> Number:
    """The value of an expression.  `InvalidRequestError` for anything but bounded arithmetic."""
    if len(expression) > MAX_LENGTH:
        raise _refused(f"the expression has more than {MAX_LENGTH} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return _bounded(_value(tree.body, 0))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _refused(f"{expression[:100]!r}: {getattr(error, 'msg', error)}") from None
    except (ArithmeticError, TypeError) as error:
        raise _refused(f"{expression[:100]!r}: {error}") from None


def _value(node: ast.expr, depth: int) -> Number:
    if depth > MAX_DEPTH:
        raise _refused("the expression is nested too deeply")
    depth += 1
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.Name) and node.id in CONSTANTS:
        return CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _bounded(_UNARY[type(node.op)](_value(node.operand, depth)))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, depth), _value(node.right, depth)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if type(node.op) in _BINARY:
            return _bounded(_BINARY[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        function = FUNCTIONS.get(node.func.id)
        if function is not None:
            return _bounded(function(*(_value(one, depth) for one in node.args)))
    raise _refused(
        f"{ast.unparse(node)[:100]!r} is no arithmetic",
        hint=f"numbers, + - * / // % **, {', '.join((*CONSTANTS, *FUNCTIONS))}",
    )


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        bits = base.bit_length()
        if bits > 1 and (exponent > MAX_BITS or bits * exponent > 2 * MAX_BITS):
            raise _too_large()
        if bits <= 1:
            exponent = exponent % 2 + 2  # of -1, 0 and 1 only that matters
    return _bounded(base**exponent)


def _bounded(value: Any) -> Number:
    if type(value) not in (int, float):
        raise _refused("the result is no real number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise _too_large()
    if isinstance(value, float) and not math.isfinite(value):
        raise _refused("the result is no finite number")
    return value  # type: ignore[no-any-return]


def _too_large() -> InvalidRequestError:
    return _refused(f"a number has more than {MAX_BITS} bits")


def _refused(message: str, hint: str = "") -> InvalidRequestError:
    return InvalidRequestError(message, hint=hint, details={"field": "expression"})
