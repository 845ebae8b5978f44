"""What a request says of tools: which there are, which may or must be called, and how the model writes a call. Pure."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from router.api.errors import ApiError, bad_request, unsupported
from router.api.structured import SCHEMA_DEPTH_MAX, sized
from router.api.tool_formats import BEGIN, END, ToolFormat
from tracehaul.engine.grammar import inline_json
from tracehaul.wire.steps import Constraint

TOOLS_MAX = 512
CALLS_MAX = 16
"""Calls in one answer that has to call: a model that has lost its way would otherwise never end."""
NAME = re.compile(r"[\w.:/-]{1,256}")
_OUTERMOST = ("$id", "$schema")
_NEXT_LINE, _NEXT_ITEM, _NEXT_OBJECT = r'"\n" call', '", " object', '"; " object'
SpecialToken = Callable[[str], int | None]


class Function(msgspec.Struct, frozen=True):
    """One tool's function."""

    name: str
    parameters: dict[str, Any] | None = None
    """A JSON schema of its arguments; None: it takes any object."""
    strict: bool | None = None


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


class Tools(msgspec.Struct, frozen=True):
    """The tools of a call that may use them."""

    functions: tuple[Function, ...]
    """All that the model is told of."""
    forced: tuple[Function, ...]
    """Those of which it has to call one; none: it calls what it likes, or nothing."""
    parallel: bool
    """Whether one answer may have several calls."""

    @property
    def names(self) -> frozenset[str]:
        """What can be called."""
        return frozenset(function.name for function in self.functions)


def tools_of(
    tools: Sequence[dict[str, Any]] | None, choice: str | dict[str, Any] | None, parallel: bool | None
) -> Tools | None:
    """The tools of a call; None if it has none or must not use them.

    Raises:
        ApiError: a tool is no function, or what is chosen is not among them.
    """
    if choice is not None and choice not in ("none", "auto") and not tools:
        raise bad_request("tool_choice needs tools", "tool_choice")
    if not tools or choice == "none":
        return None
    if len(tools) > TOOLS_MAX:
        raise bad_request(f"at most {TOOLS_MAX} tools are possible", "tools")
    functions = tuple(_function(tool, f"tools[{at}]") for at, tool in enumerate(tools))
    return Tools(functions, _forced(functions, choice), parallel is not False)


def _function(tool: dict[str, Any], where: str) -> Function:
    try:
        function = msgspec.convert(tool, Tool).function
    except msgspec.ValidationError as error:
        raise bad_request(f"{where}: {error}", where) from None
    if not NAME.fullmatch(function.name):
        rule = "a tool's name has 1 to 256 letters, digits and any of _ . : / -"
        raise bad_request(f"{rule}, and not {function.name[:64]!r}", f"{where}.function.name")
    return function


def _forced(functions: tuple[Function, ...], choice: str | dict[str, Any] | None) -> tuple[Function, ...]:
    if choice is None or choice == "auto":
        return ()
    if choice == "required":
        return functions
    if isinstance(choice, str):
        raise bad_request("tool_choice is none, auto, required or names a function", "tool_choice", "invalid_value")
    if choice.get("type") != "function":
        raise unsupported("tool_choice", f"a tool_choice of type {str(choice.get('type'))[:64]!r}")
    try:
        name = msgspec.convert(choice, NamedChoice).function.name
    except msgspec.ValidationError as error:
        raise bad_request(f"tool_choice: {error}", "tool_choice") from None
    named = tuple(function for function in functions if function.name == name)
    if not named:
        raise bad_request(f"tool_choice names {name[:64]!r}, which is not among the tools", "tool_choice")
    return named[:1]


def format_of(template: str | None) -> ToolFormat:
    """How a model writes calls, by what its chat template shows it of them."""
    template = template or ""
    if BEGIN["mistral"] in template:
        return "mistral"
    if BEGIN["hermes"] not in template and (BEGIN["llama3"] in template or "ipython" in template):
        return "llama3"
    return "hermes"


def calls_constraint(tools: Tools, form: ToolFormat, special: SpecialToken) -> Constraint:
    """An answer that calls one of ``tools.forced``, or several where that is allowed.

    ``special`` tells the model's special token of a text.

    Raises:
        ApiError: the functions' schemas are too large.
    """
    return sized(Constraint("grammar", "start: calls\n" + _calls(tools, tools.forced, form, special)), "tools")


def answer_or_calls(answer: Constraint, tools: Tools, form: ToolFormat, special: SpecialToken) -> Constraint | None:
    """An answer that matches the JSON schema of ``answer``, or calls; None where only a schema can be combined."""
    if answer.kind != "json_schema" or form == "llama3":
        return None
    calls = _calls(tools, tools.functions, form, special)
    schema = inline_json(json.loads(answer.source), lenient=answer.lenient)
    source = f"start: answer | calls\nanswer: {schema}\n{calls}"
    return sized(Constraint("grammar", source), "tools")


def _calls(tools: Tools, functions: Sequence[Function], form: ToolFormat, special: SpecialToken) -> str:
    key = "parameters" if form == "llama3" else "arguments"
    lenient = not any(function.strict for function in functions)
    one = inline_json(_one_of(functions, key), lenient=lenient)

    def more(rule: str) -> str:
        return f" ({rule}){{0,{CALLS_MAX - 1}}}" if tools.parallel else ""

    begin, end = (_marker(text, special) for text in (BEGIN[form], END))
    match form:
        case "hermes":
            rules = f'calls: call{more(_NEXT_LINE)}\ncall: {begin} "\\n" object "\\n" {end}'
        case "mistral":
            rules = f'calls: {begin} " "? "[" object{more(_NEXT_ITEM)} "]"'
        case "llama3":
            rules = f"calls: object{more(_NEXT_OBJECT)}"
    return f"{rules}\nobject: {one}\n"


def _marker(text: str, special: SpecialToken) -> str:
    """What marks a call, in a grammar: its text, or where it is a special token, that token."""
    token = special(text)
    return json.dumps(text) if token is None else f"<[{token}]>"


def _one_of(functions: Sequence[Function], key: str) -> dict[str, Any]:
    """The schema of an object that calls one of ``functions``."""
    schemas: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for at, function in enumerate(functions):
        parameters = function.parameters or {"type": "object"}
        kept = {name: value for name, value in parameters.items() if name not in _OUTERMOST}
        schemas[f"p{at}"] = _moved({"type": "object", **kept}, f"#/$defs/p{at}")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function.name}, key: {"$ref": f"#/$defs/p{at}"}},
                "required": ["name", key],
                "additionalProperties": False,
            }
        )
    return {"$defs": schemas, **(calls[0] if len(calls) == 1 else {"anyOf": calls})}


def _moved(schema: Any, to: str, depth: int = 0) -> Any:
    """``schema`` with its references to itself as they are where it lies at ``to``."""
    if depth > SCHEMA_DEPTH_MAX:
        raise _too_deep()
    if isinstance(schema, dict):
        return {
            key: to + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, to, depth + 1)
            for key, value in schema.items()
        }
    return [_moved(item, to, depth + 1) for item in schema] if isinstance(schema, list) else schema


def _too_deep() -> ApiError:
    return bad_request("a tool's parameters are nested too deeply", "tools")
