"""The tools of a call: which there are, which must be called, and how the model writes a call. Pure."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from router.calls.errors import CallFailed, invalid
from router.calls.structured import SCHEMA_DEPTH_MAX, sized
from router.calls.tool_formats import BEGIN, END, ToolFormat
from tracehaul.engine.grammar import inline_json
from tracehaul.wire.steps import Constraint

CALLS_MAX = 16
"""Calls in one answer that has to call: a model that has lost its way would otherwise never end."""
_OUTERMOST = ("$id", "$schema")
_NEXT_LINE, _NEXT_ITEM, _NEXT_OBJECT = r'"\n" call', '", " object', '"; " object'
SpecialToken = Callable[[str], int | None]


class Function(msgspec.Struct, frozen=True):
    """One tool's function."""

    name: str
    parameters: dict[str, Any] | None = None
    """A JSON schema of its arguments; None: it takes any object."""
    strict: bool | None = None


class Tools(msgspec.Struct, frozen=True):
    """The tools of a call that may use them."""

    functions: tuple[Function, ...]
    """All that the model is told of."""
    forced: tuple[Function, ...]
    """Those of which it has to call one; none: it calls what it likes, or nothing."""
    parallel: bool
    """Whether one answer may have several calls."""
    told: list[dict[str, Any]]
    """All of them as chat templates read them: ``{"type": "function", "function": {...}}``."""

    @property
    def names(self) -> frozenset[str]:
        """What can be called."""
        return frozenset(function.name for function in self.functions)


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
        CallFailed: the functions' schemas are too large.
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


def _too_deep() -> CallFailed:
    return invalid("a tool's parameters are nested too deeply", "tools")
