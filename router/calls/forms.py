"""The form of a call's answers: what they are held to, and how they are read."""

import re
from collections.abc import Set as AbstractSet

import msgspec
from blake3 import blake3

from router.calls.call import Call, Options, Wanted
from router.calls.errors import invalid
from router.calls.reading import AnswerReader
from router.calls.reasoning import CLOSE, OPEN, ThinkReader
from router.calls.structured import Check, settled
from router.calls.text import Text, TextStream
from router.calls.tool_formats import MARKERS, ToolFormat, ToolReader
from router.calls.tool_grammar import calls_constraint
from router.calls.tools import Tools, format_of
from tracehaul.engine.grammar import GrammarCheck
from tracehaul.model.adapting import SHORT_ID_CHARACTERS, in_letters
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.steps import Constraint

_ID: dict[ToolFormat, re.Pattern[str]] = {
    "hermes": re.compile(r"[\w-]{1,64}", re.ASCII),
    "llama3": re.compile(r"[\w-]{1,64}", re.ASCII),
    "mistral": re.compile(rf"[A-Za-z0-9]{{{SHORT_ID_CHARACTERS}}}"),
}
"""Those of a model that can be told to a client and sent back."""


class Form(msgspec.Struct, frozen=True):
    """Of one call's answers."""

    constraint: Constraint | None = None
    tools: Tools | None = None


class Forms:
    """Decides forms for one model. ``tool_format``: how it writes calls; None: as its chat template tells."""

    def __init__(self, text: Text, tool_format: ToolFormat | None) -> None:
        self._text = text
        self._format: ToolFormat = tool_format or format_of(text.chat_template)
        self._thinks = CLOSE in (text.chat_template or "")
        self._ids_last = self._format == "mistral" and '"id"' in (text.chat_template or "")
        """It is shown calls whose ids come last, so it may write such."""
        self._grammars = GrammarCheck()

    async def of(self, call: Call) -> Form:
        """A call's form.

        Raises:
            CallFailed: it contradicts itself, or its schema, expression, grammar or tools cannot be used; says why.
        """
        tools, wanted = call.tools, call.wanted
        if tools is not None and tools.forced:
            if wanted is not None:
                message = f"{wanted.param} and a tool_choice that forces a call contradict each other"
                raise invalid(message, wanted.param)
            return Form(await self._checked(tools, None, call.options), tools)
        if wanted is None:
            return Form(None, tools)
        if wanted.constraint.kind != "json_schema":
            # A call could not be told from such an answer, so there is none.
            tools = None
        return Form(await self._checked(tools, wanted, call.options), tools)

    def constraint(self, form: Form, prompt: str | None) -> Constraint | None:
        """What an answer is held to that follows ``prompt``, a rendered conversation (None: it is none)."""
        if form.constraint is None or prompt is None or not self._thinks:
            return form.constraint
        ending = prompt.rstrip()
        if ending.endswith(CLOSE):  # the template has closed it: the model does not think
            return form.constraint
        return msgspec.structs.replace(form.constraint, thinking="opened" if ending.endswith(OPEN) else "may")

    def stream(self, form: Form) -> TextStream:
        """Reads the text of an answer of that form."""
        return self._text.stream(MARKERS[self._format] if form.tools is not None else ())

    def reader(self, form: Form, prompt: str | None, name: str, taken: AbstractSet[str] = frozenset()) -> AnswerReader:
        """Reads what an answer says that follows ``prompt``, as above; ``name`` tells it from all others.
        ``taken``: ids of the conversation's calls, which no other call can have."""
        if prompt is None:
            return AnswerReader()
        think = ThinkReader(opened=prompt.rstrip().endswith(OPEN)) if self._thinks else None
        tools = form.tools
        given = set(taken)

        def call_id(index: int, chosen: str) -> str:
            found = self._call_id(f"{name}-{index}")
            if chosen not in given and _ID[self._format].fullmatch(chosen):
                found = chosen
            given.add(found)
            return found

        if tools is None:
            return AnswerReader(think)
        # Where something marks a call, one of a tool that is not there is the client's to refuse.
        names = tools.names if self._format == "llama3" or tools.allowed is not None else None
        # What is held to a grammar has no ids.
        ids = self._ids_last and form.constraint is None
        reader = ToolReader(self._format, names, forced=bool(tools.forced), ids=ids)
        return AnswerReader(think, reader, parallel=tools.parallel, customs=tools.customs, call_id=call_id)

    def _call_id(self, name: str) -> str:
        letters = in_letters(blake3(name.encode()).digest(24), 24)
        return letters[:SHORT_ID_CHARACTERS] if self._format == "mistral" else f"call_{letters}"

    async def _checked(self, tools: Tools | None, wanted: Wanted | None, opts: Options) -> Constraint:
        """Calls of tools, what is wanted, or either."""
        param = "tools" if wanted is None else wanted.param
        for name, given in (("min_tokens", opts.min_tokens > 0), ("ignore_eos", opts.ignore_eos)):
            if given:
                raise invalid(f"{name} contradicts {param}, which alone says where the answer ends", name)

        def find(check: Check) -> Constraint:
            answer = None if wanted is None else settled(wanted.constraint, check)
            if tools is None and answer is not None:
                return answer
            assert tools is not None
            return calls_constraint(tools, self._format, self._text.special_token, check, answer)

        try:
            return await self._grammars.find((self._format, tools, wanted), find)
        except InvalidRequest as error:
            raise invalid(str(error), param, "invalid_grammar") from None
        except RecursionError:
            raise invalid("the tools are nested too deeply", "tools") from None
