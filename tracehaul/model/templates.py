"""A model's chat template: what it takes, and what is done where it does not.

Templates are programs, each with its own idea of a conversation: some refuse two calls in one answer, or a user who
speaks twice, or ids that are not theirs; some leave calls and tools out without a word. What one takes is tried once,
when it is loaded; messages are then brought into a form that it takes.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tracehaul.model.adapting import Message, Needs, adapted, filled, with_tools
from tracehaul.runtime.clock import wall_s
from tracehaul.wire.errors import InvalidRequest

_TOOL_VARIABLES = ("xml_tools", "python_tools")
"""Where some templates look for tools, each written as JSON."""
_RESERVED = frozenset(("messages", "tools", "add_generation_prompt", "strftime_now", "raise_exception"))


class ChatTemplate:
    """One template. ``special`` holds what it may name: ``bos_token`` and such.

    Raises:
        jinja2.TemplateSyntaxError: it is none.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self.source = source
        self._special = dict(special)
        self._template = _environment().from_string(source)
        self.needs = self._probed()
        """What it does not take by itself."""

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        now_s: float | None = None,
    ) -> str:
        """The prompt of a conversation.

        Args:
            messages: role, content and so on, as the hub's conventions have them.
            tools: functions that can be called, as OpenAI's requests have them.
            add_generation_prompt: whether the model's turn begins at its end.
            variables: more for the template to read.
            now_s: seconds since 1970 that it takes for now; None: now.

        Raises:
            InvalidRequest: the template does not take these messages.
        """
        more = {key: value for key, value in (variables or {}).items() if key not in _RESERVED}
        if tools and self.needs.tools_as:
            written = [json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools]
            more.setdefault(self.needs.tools_as, written)
        found = adapted(messages, self.needs)
        if tools and self.needs.tools_unseen:
            found = with_tools(found, tools)
        now = partial(_strftime, wall_s() if now_s is None else now_s)
        return self._rendered(found, tools, more, add_generation_prompt=add_generation_prompt, strftime_now=now)

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None,
        variables: Mapping[str, Any],
        **given: Any,
    ) -> str:
        """The prompt of messages that need no change; tools without what they may lack are tried first."""
        try:
            return self._tried(messages, tools, variables, given)
        except InvalidRequest:
            complete = filled(tools)
            if complete == tools:
                raise
            return self._tried(messages, complete, variables, given)

    def _tried(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None,
        variables: Mapping[str, Any],
        given: Mapping[str, Any],
    ) -> str:
        fixed = {**given, **self._special}
        tools = None if tools is None else list(tools)
        try:
            return self._template.render(
                {"documents": None, **variables}, messages=list(messages), tools=tools, **fixed
            )
        # A template is a program of the model's: on messages that it did not expect it may raise nearly anything.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from error

    # --- what it takes --------------------------------------------------------------------------------------

    def _probed(self) -> Needs:
        """Tried on small conversations. An order of trials: what one needs, the next has."""
        needs = Needs()
        if not self._shows(needs, _CALLED, "probe_one") and self._shows(needs, _with_ids(_CALLED), "probe_one"):
            needs = needs.but(short_ids=True)
        if not self._shows(needs, _CALLED, "probe_one"):
            needs = needs.but(calls_as_text=True)
        elif not self._shows(needs, _CALLED_TWICE, "probe_one", "probe_two"):
            needs = needs.but(one_call=True)
        if not self._shows(needs, _NEIGHBOURS, "first said", "second said", "third said"):
            needs = needs.but(turns=True)
        if not self._shows(needs, _SYSTEMS, "first rule", "second rule", "late rule"):
            needs = needs.but(one_system=True)
        with_user = needs.but(user=True)
        alone = self._shows(needs, _UNASKED, "first rule") and self._shows(needs, _UNASKED, tools=filled([_TOOL]))
        if not alone and self._shows(with_user, _UNASKED, "first rule"):
            needs = with_user
        in_words = needs.but(words=True)
        if not self._shows(needs, _SILENT, "first said", "second said") and self._shows(in_words, _SILENT):
            needs = in_words
        return needs.but(**self._tools_at(needs))

    def _tools_at(self, needs: Needs) -> dict[str, Any]:
        """Where it reads tools."""
        tools = filled([_TOOL])
        if self._shows(needs, _ASKED, "probe_one", tools=tools):
            return {}
        written = [json.dumps(_TOOL["function"])]
        for name in _TOOL_VARIABLES:
            if self._shows(needs, _ASKED, "probe_one", variables={name: written}):
                return {"tools_as": name}
        return {"tools_unseen": True}

    def _shows(
        self,
        needs: Needs,
        messages: Sequence[Message],
        *texts: str,
        tools: Sequence[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> bool:
        """Whether it takes these messages and shows each of these texts, in order."""
        try:
            found = adapted(messages, needs)
            now = partial(_strftime, 0.0)
            rendered = self._rendered(found, tools, variables or {}, add_generation_prompt=True, strftime_now=now)
        except InvalidRequest:
            return False
        at = 0
        for text in texts:
            at = rendered.find(text, at)
            if at < 0:
                return False
        return True


def _call(name: str, at: int) -> dict[str, Any]:
    return {"id": f"call_{at:032d}", "type": "function", "function": {"name": name, "arguments": {"x": 1}}}


def _result(at: int) -> Message:
    return {"role": "tool", "content": f"result {at}", "tool_call_id": f"call_{at:032d}"}


def _with_ids(messages: Sequence[Message]) -> list[Message]:
    return adapted(messages, Needs(short_ids=True))


_USER: Message = {"role": "user", "content": "first said"}
_ANSWER: Message = {"role": "assistant", "content": "fine"}
_ASKED: list[Message] = [_USER]
_CALLED: list[Message] = [
    _USER,
    {"role": "assistant", "content": "", "tool_calls": [_call("probe_one", 1)]},
    _result(1),
]
_CALLED_TWICE: list[Message] = [
    _USER,
    {"role": "assistant", "content": "", "tool_calls": [_call("probe_one", 1), _call("probe_two", 2)]},
    _result(1),
    _result(2),
]
_NEIGHBOURS: list[Message] = [
    _USER,
    {"role": "user", "content": "second said"},
    *_CALLED[1:],
    {"role": "user", "content": "third said"},
]
_SYSTEMS: list[Message] = [
    {"role": "system", "content": "first rule"},
    {"role": "system", "content": "second rule"},
    _USER,
    _ANSWER,
    {"role": "system", "content": "late rule"},
    _USER,
]
_UNASKED: list[Message] = _SYSTEMS[:1]
_SILENT: list[Message] = [_USER, {"role": "assistant", "content": ""}, _NEIGHBOURS[1]]
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "probe_one", "description": "", "parameters": {"type": "object", "properties": {}}},
}


# --- jinja --------------------------------------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what the model wrote, for training; here its body is simply shown."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance variable

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Templates see what the hub's conventions promise, and nothing of this process."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    functions: Any = environment.globals
    functions.update(raise_exception=_raise_exception)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not jinja2's own filter: that one escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime(now_s: float, form: str) -> str:
    return datetime.fromtimestamp(now_s, UTC).astimezone().strftime(form)
