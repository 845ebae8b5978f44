"""Grammars of answers that call tools. Pure.

Each tool's schema is a part of its own, so that it is read as its author wrote it: its references, its anchors, its
strictness are its alone. What stands around it is the grammar's.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from router.calls.errors import CallFailed, invalid
from router.calls.schemas import bare, softened
from router.calls.structured import SOURCE_CHARACTERS_MAX, Check, pattern_constraint, too_deep
from router.calls.tool_formats import BEGIN, END, ToolFormat
from router.calls.tools import Function, Tools
from tracehaul.engine.grammar import WHITESPACE_MAX, inline_json
from tracehaul.wire.steps import CONSTRAINT_CHARACTERS_MAX, Constraint

CALLS_MAX = 16
"""Calls in one answer that has to call: a model that has lost its way would otherwise never end."""
_NEXT_LINE, _NEXT_ITEM, _NEXT_OBJECT = r'"\n" call', '", " object', '"; " object'
_NAME = '"name"'
_SPACE = rf"SPACE: /[ \t\r\n]{{1,{WHITESPACE_MAX}}}/"
_ANY: dict[str, Any] = {"type": "object"}
SpecialToken = Callable[[str], int | None]


class Part(msgspec.Struct, frozen=True):
    """One tool in a grammar."""

    name: str
    schema: dict[str, Any]
    lenient: bool

    @property
    def source(self) -> str:
        """The schema as JSON."""
        return json.dumps(self.schema, ensure_ascii=False)

    @property
    def inline(self) -> str:
        """The schema in a grammar."""
        return inline_json(self.schema, lenient=self.lenient)


def calls_constraint(
    tools: Tools, form: ToolFormat, special: SpecialToken, check: Check, answer: Constraint | None = None
) -> Constraint:
    """An answer that calls what it has to, or else what it may; or that matches the JSON schema of ``answer``.

    What cannot be enforced of a lenient tool's schema is left to the model, and all of it where together they are too
    much: the largest first. ``special`` tells the model's special token of a text.

    Raises:
        CallFailed: a strict tool's schema cannot be used, or together they are too large.
    """

    def made(parts: Sequence[Part]) -> tuple[Constraint, str]:
        grammar = Constraint("grammar", _grammar(parts, form, special, parallel=tools.parallel, answer=answer))
        if len(grammar.source) > CONSTRAINT_CHARACTERS_MAX:
            return grammar, f"the tools' schemas must have at most {CONSTRAINT_CHARACTERS_MAX} characters together"
        return grammar, check(grammar)

    functions = tools.forced or tools.callable
    if not any(too_deep(function.parameters) for function in functions):
        parts = [_part(function) for function in functions]
        # The library follows references by recursion: a part is no longer than a schema may be.
        if all(len(part.source) <= SOURCE_CHARACTERS_MAX for part in parts):
            grammar, wrong = made(parts)
            if not wrong:
                return grammar
    parts = [_usable(function, check) for function in functions]
    while True:
        grammar, wrong = made(parts)
        if not wrong:
            return grammar
        loosened = _loosened(parts)
        if loosened is None:
            raise invalid(f"the tools together cannot be used: {wrong}", "tools", "invalid_grammar")
        parts = loosened


def _part(function: Function) -> Part:
    parameters = function.parameters or {}
    kind = parameters.get("type", "object")
    if function.strict and kind != "object":
        raise _unusable(function, f"their type is {str(kind)[:64]!r}, and arguments are an object")
    return Part(function.name, {**bare(parameters), **_ANY}, not function.strict)


def _usable(function: Function, check: Check) -> Part:
    """A tool by itself, with what can be enforced of it. Raises CallFailed if it is strict and cannot be."""

    def wrong_with(part: Part) -> str:
        source = part.source
        if len(source) > SOURCE_CHARACTERS_MAX:
            return f"they must have at most {SOURCE_CHARACTERS_MAX} characters"
        return check(Constraint("json_schema", source, part.lenient))

    def usable(pattern: str) -> bool:
        return not check(pattern_constraint(pattern))

    wrong = "they are nested too deeply"
    if not too_deep(function.parameters):
        part = _part(function)
        wrong = wrong_with(part)
        if not wrong:
            return part
        part = msgspec.structs.replace(part, schema=softened(part.schema, usable))
        if part.lenient and not wrong_with(part):
            return part
    if function.strict:
        raise _unusable(function, wrong)
    return Part(function.name, _ANY, lenient=True)


def _unusable(function: Function, why: str) -> CallFailed:
    return invalid(f"the parameters of the tool {function.name!r} cannot be used: {why}", "tools", "invalid_grammar")


def _loosened(parts: Sequence[Part]) -> list[Part] | None:
    """The larger half of what can be left to the model left to it; None where nothing can."""
    sizes = sorted((len(part.inline) for part in parts if part.lenient and part.schema != _ANY), reverse=True)
    if not sizes:
        return None
    least = sizes[(len(sizes) - 1) // 2]
    return [
        Part(part.name, _ANY, lenient=True) if part.lenient and len(part.inline) >= least else part for part in parts
    ]


def _grammar(
    parts: Sequence[Part], form: ToolFormat, special: SpecialToken, *, parallel: bool, answer: Constraint | None
) -> str:
    def more(rule: str) -> str:
        return f" ({rule}){{0,{CALLS_MAX - 1}}}" if parallel else ""

    begin, end = (_marker(text, special) for text in (BEGIN[form], END))
    match form:
        case "hermes":
            rules = [rf"calls: call{more(_NEXT_LINE)}", rf'call: {begin} "\n" object "\n" {end}']
        case "mistral":
            rules = [f'calls: {begin} " "? "[" object{more(_NEXT_ITEM)} "]"']
        case "llama3":
            rules = [f"calls: object{more(_NEXT_OBJECT)}"]
    names: dict[str, list[str]] = {}
    for part in parts:
        names.setdefault(part.inline, []).append(_text(json.dumps(part.name, ensure_ascii=False)))
    key = _text('"parameters"' if form == "llama3" else '"arguments"')
    rules.append(f'object: "{{" SPACE? {_text(_NAME)} SPACE? ":" SPACE? ({_any("named", len(names))}) SPACE? "}}"')
    for at, (schema, called) in enumerate(names.items()):
        rules.append(f'named{at}: ({" | ".join(called)}) SPACE? "," SPACE? {key} SPACE? ":" SPACE? schema{at}')
        rules.append(f"schema{at}: {schema}")
    if answer is None:
        rules.insert(0, "start: calls")
    else:
        schema = inline_json(json.loads(answer.source), lenient=answer.lenient)
        rules[:0] = ["start: answer | calls", f"answer: {schema}"]
    return "\n".join([*rules, _SPACE, ""])


def _any(rule: str, count: int) -> str:
    return " | ".join(f"{rule}{at}" for at in range(count))


def _text(text: str) -> str:
    """In a grammar, what stands for a text."""
    return json.dumps(text, ensure_ascii=False)


def _marker(text: str, special: SpecialToken) -> str:
    """What marks a call, in a grammar: its text, or where it is a special token, that token."""
    token = special(text)
    return _text(text) if token is None else f"<[{token}]>"
