"""The form of a call's answers: what they are held to, and how they are read."""

import string

import msgspec
from blake3 import blake3

from router.calls.call import Call, Options, Wanted
from router.calls.errors import invalid
from router.calls.reading import AnswerReader
from router.calls.reasoning import CLOSE, OPEN, ThinkReader
from router.calls.text import Text, TextStream
from router.calls.tool_formats import MARKERS, ToolFormat, ToolReader
from router.calls.tools import Tools, answer_or_calls, calls_constraint, format_of
from tracehaul.engine.grammar import GrammarCheck
from tracehaul.wire.errors import InvalidRequest
from tracehaul.wire.steps import Constraint

_LETTERS = string.ascii_letters + string.digits
MISTRAL_ID_CHARACTERS = 9
"""Mistral's templates take ids of no other length."""


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
            wanted = Wanted(calls_constraint(tools, self._format, self._text.special_token), "tools")
        elif tools is not None and wanted is not None:
            both = answer_or_calls(wanted.constraint, tools, self._format, self._text.special_token)
            if both is None:
                # A call could not be told from such an answer, so there is none.
                tools = None
            else:
                wanted = Wanted(both, wanted.param)
        if wanted is None:
            return Form(None, tools)
        await self._check(wanted, call.options)
        return Form(wanted.constraint, tools)

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

    def reader(self, form: Form, prompt: str | None, name: str) -> AnswerReader:
        """Reads what an answer says that follows ``prompt``, as above; ``name`` tells it from all others."""
        if prompt is None:
            return AnswerReader()
        think = ThinkReader(opened=prompt.rstrip().endswith(OPEN)) if self._thinks else None
        tools = None if form.tools is None else ToolReader(self._format, form.tools.names)
        parallel = form.tools is None or form.tools.parallel
        return AnswerReader(think, tools, parallel=parallel, call_id=lambda index: self._call_id(f"{name}-{index}"))

    def _call_id(self, name: str) -> str:
        digest = int.from_bytes(blake3(name.encode()).digest(24))
        letters = _base(digest, 24)
        return letters[:MISTRAL_ID_CHARACTERS] if self._format == "mistral" else f"call_{letters}"

    async def _check(self, wanted: Wanted, opts: Options) -> None:
        param = wanted.param
        for name, given in (("min_tokens", opts.min_tokens > 0), ("ignore_eos", opts.ignore_eos)):
            if given:
                raise invalid(f"{name} contradicts {param}, which alone says where the answer ends", name)
        try:
            await self._grammars.check(wanted.constraint)
        except InvalidRequest as error:
            raise invalid(str(error), param, "invalid_grammar") from None


def _base(number: int, length: int) -> str:
    """The lowest ``length`` digits of ``number``, in letters and digits."""
    digits: list[str] = []
    for _ in range(length):
        number, digit = divmod(number, len(_LETTERS))
        digits.append(_LETTERS[digit])
    return "".join(digits)
