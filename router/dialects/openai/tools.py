"""The tools of a request of OpenAI's form: which there are, and which may or must be called. Pure."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from router.calls.errors import invalid, unsupported
from router.calls.tools import Function, Tools

TOOLS_MAX = 512
NAME = re.compile(r"[\w.:/-]{1,256}")


class Tool(msgspec.Struct, frozen=True):
    """One of ``tools``."""

    function: Function
    type: Literal["function"]


class NamedFunction(msgspec.Struct, frozen=True):
    """The inside of a :class:`NamedChoice`."""

    name: str


class NamedChoice(msgspec.Struct, frozen=True):
    """A ``tool_choice`` that names one tool."""

    function: NamedFunction
    type: Literal["function"] = "function"


def tools_of(
    tools: Sequence[dict[str, Any]] | None, choice: str | dict[str, Any] | None, parallel: bool | None
) -> Tools | None:
    """The tools of a call; None if it has none or must not use them.

    Raises:
        CallFailed: a tool is no function, or what is chosen is not among them.
    """
    if choice is not None and choice not in ("none", "auto") and not tools:
        raise invalid("tool_choice needs tools", "tool_choice")
    if not tools or choice == "none":
        return None
    if len(tools) > TOOLS_MAX:
        raise invalid(f"at most {TOOLS_MAX} tools are possible", "tools")
    functions = tuple(_function(tool, f"tools[{at}]") for at, tool in enumerate(tools))
    return Tools(functions, _forced(functions, choice), parallel is not False, list(tools))


def _function(tool: dict[str, Any], where: str) -> Function:
    try:
        function = msgspec.convert(tool, Tool).function
    except msgspec.ValidationError as error:
        raise invalid(f"{where}: {error}", where) from None
    if not NAME.fullmatch(function.name):
        rule = "a tool's name has 1 to 256 letters, digits and any of _ . : / -"
        raise invalid(f"{rule}, and not {function.name[:64]!r}", f"{where}.function.name")
    return function


def _forced(functions: tuple[Function, ...], choice: str | dict[str, Any] | None) -> tuple[Function, ...]:
    if choice is None or choice == "auto":
        return ()
    if choice == "required":
        return functions
    if isinstance(choice, str):
        raise invalid("tool_choice is none, auto, required or names a function", "tool_choice", "invalid_value")
    if choice.get("type") != "function":
        raise unsupported("tool_choice", f"a tool_choice of type {str(choice.get('type'))[:64]!r}")
    try:
        name = msgspec.convert(choice, NamedChoice).function.name
    except msgspec.ValidationError as error:
        raise invalid(f"tool_choice: {error}", "tool_choice") from None
    named = tuple(function for function in functions if function.name == name)
    if not named:
        raise invalid(f"tool_choice names {name[:64]!r}, which is not among the tools", "tool_choice")
    return named[:1]


def names_of(tools: Sequence[dict[str, Any]] | None) -> tuple[str, ...]:
    """Names of the tools that have one, in order; whatever else is wrong with them."""
    functions = [tool.get("function") for tool in tools or ()]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return tuple(name for name in names if isinstance(name, str))
