"""The tools of a request of OpenAI's form: which there are, and which may or must be called. Pure."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from router.calls import custom
from router.calls.errors import invalid, unsupported
from router.calls.tools import Function, Tools

TOOLS_MAX = 512
NAME = re.compile(r"[\w.:/-]{1,256}")
_KINDS = ("function", "custom")
Choice = str | dict[str, Any] | None


class Definition(msgspec.Struct, frozen=True):
    """The inside of a :class:`FunctionTool`."""

    name: str
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(msgspec.Struct, frozen=True, tag_field="type", tag="function"):
    """One of ``tools``."""

    function: Definition


class CustomGrammar(msgspec.Struct, frozen=True):
    """The inside of a :class:`CustomFormat`."""

    definition: str
    syntax: Literal["lark", "regex"]


class CustomFormat(msgspec.Struct, frozen=True):
    """What the text of a custom tool looks like."""

    type: Literal["text", "grammar"]
    grammar: CustomGrammar | None = None


class Custom(msgspec.Struct, frozen=True):
    """The inside of a :class:`CustomTool`."""

    name: str
    description: str | None = None
    format: CustomFormat | None = None


class CustomTool(msgspec.Struct, frozen=True, tag_field="type", tag="custom"):
    """One of ``tools`` that takes a text."""

    custom: Custom


class Named(msgspec.Struct, frozen=True):
    """The inside of a choice that names one tool."""

    name: str


class NamedFunction(msgspec.Struct, frozen=True, tag_field="type", tag="function"):
    """A ``tool_choice`` that names one tool."""

    function: Named


class NamedCustom(msgspec.Struct, frozen=True, tag_field="type", tag="custom"):
    """The same of a custom one."""

    custom: Named


class Allowed(msgspec.Struct, frozen=True):
    """The inside of :class:`AllowedTools`."""

    mode: Literal["auto", "required"]
    tools: list[dict[str, Any]]


class AllowedTools(msgspec.Struct, frozen=True, tag_field="type", tag="allowed_tools"):
    """A ``tool_choice`` that leaves only some tools to call."""

    allowed_tools: Allowed


def tools_of(tools: Sequence[dict[str, Any]] | None, choice: Choice, parallel: bool | None) -> Tools | None:
    """The tools of a call; None if it has none or must not use them.

    Raises:
        CallFailed: a tool is none, or what is chosen is not among them.
    """
    if choice is not None and choice not in ("none", "auto") and not tools:
        raise invalid("tool_choice needs tools", "tool_choice")
    if not tools or choice == "none":
        return None
    if len(tools) > TOOLS_MAX:
        raise invalid(f"at most {TOOLS_MAX} tools are possible", "tools")
    read = [_tool(tool, f"tools[{at}]") for at, tool in enumerate(tools)]
    functions, told = tuple(function for function, _ in read), [each for _, each in read]
    forced, allowed = _chosen(functions, choice)
    return Tools(functions, forced, parallel is not False, told, allowed)


def names_of(tools: Sequence[dict[str, Any]] | None) -> tuple[str, ...]:
    """Names of the tools that have one, in order; whatever else is wrong with them."""
    insides = [tool.get(kind) for tool in tools or () for kind in _KINDS]
    names = [inside.get("name") for inside in insides if isinstance(inside, dict)]
    return tuple(name for name in names if isinstance(name, str))


def _tool(tool: dict[str, Any], where: str) -> tuple[Function, dict[str, Any]]:
    """A tool, and as chat templates read it."""
    if tool.get("type") not in _KINDS:
        raise unsupported(where, f"a tool of type {str(tool.get('type'))[:64]!r}")
    try:
        read: FunctionTool | CustomTool = msgspec.convert(tool, FunctionTool | CustomTool)
    except msgspec.ValidationError as error:
        raise invalid(f"{where}: {error}", where) from None
    match read:
        case FunctionTool(Definition(name, parameters, strict)):
            function, told = Function(name, parameters, strict), tool
        case CustomTool(inside):
            function, told = _custom(inside)
    if not NAME.fullmatch(function.name):
        rule = "a tool's name has 1 to 256 letters, digits and any of _ . : / -"
        raise invalid(f"{rule}, and not {function.name[:64]!r}", f"{where}.{tool['type']}.name")
    return function, told


def _custom(tool: Custom) -> tuple[Function, dict[str, Any]]:
    """The model is told of a function; a grammar in Lark's syntax it is told alone, for no schema could hold it."""
    grammar = tool.format.grammar if tool.format is not None and tool.format.type == "grammar" else None
    description = tool.description or ""
    if grammar is not None:
        description += f"\n\nIts {custom.INPUT} follows this grammar ({grammar.syntax}):\n{grammar.definition}"
    pattern = grammar.definition if grammar is not None and grammar.syntax == "regex" else None
    function = Function(tool.name, custom.parameters(pattern), strict=pattern is not None, custom=True)
    inside = {"name": tool.name, "description": description.strip(), "parameters": custom.parameters()}
    return function, {"type": "function", "function": inside}


def _chosen(
    functions: tuple[Function, ...], choice: Choice
) -> tuple[tuple[Function, ...], tuple[Function, ...] | None]:
    """The tools of which one must be called, and those that may be; None: all."""
    if choice is None or choice == "auto":
        return (), None
    if choice == "required":
        return functions, None
    if isinstance(choice, str):
        raise invalid("tool_choice is none, auto, required or names a tool", "tool_choice", "invalid_value")
    if choice.get("type") not in (*_KINDS, "allowed_tools"):
        raise unsupported("tool_choice", f"a tool_choice of type {str(choice.get('type'))[:64]!r}")
    try:
        read: NamedFunction | NamedCustom | AllowedTools = msgspec.convert(
            choice, NamedFunction | NamedCustom | AllowedTools
        )
    except msgspec.ValidationError as error:
        raise invalid(f"tool_choice: {error}", "tool_choice") from None
    match read:
        case AllowedTools(Allowed(mode, names)):
            return _allowed(functions, mode, names)
        case NamedFunction(Named(name)) | NamedCustom(Named(name)):
            return (_named(functions, name),), None


def _allowed(
    functions: tuple[Function, ...], mode: str, tools: Sequence[dict[str, Any]]
) -> tuple[tuple[Function, ...], tuple[Function, ...]]:
    names = names_of(tools)
    if not names or len(names) != len(tools):
        raise invalid("allowed_tools names at least one tool, each by its type and name", "tool_choice")
    allowed = tuple(_named(functions, name) for name in dict.fromkeys(names))
    return (allowed if mode == "required" else ()), allowed


def _named(functions: tuple[Function, ...], name: str) -> Function:
    found = next((function for function in functions if function.name == name), None)
    if found is None:
        raise invalid(f"tool_choice names {name[:64]!r}, which is not among the tools", "tool_choice")
    return found
