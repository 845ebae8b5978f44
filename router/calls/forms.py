"""The form of a call's answers: what they are held to, and how they are read."""

import string

import msgspec
from blake3 import blake3

from router.api.errors import bad_request
from router.api.reading import ChatReader
from router.api.reasoning import CLOSE, OPEN, ThinkReader
from router.api.requests import ChatRequest, CompletionRequest, Options
from router.api.structured import Wishes, constraint
from router.api.text import Text, TextStream
from router.api.tool_formats import MARKERS, ToolFormat, ToolReader
from router.api.tools import Tools, answer_or_calls, calls_constraint, format_of, tools_of
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

    async def of(self, request: ChatRequest | CompletionRequest, opts: Options) -> Form:
        """A request's form.

        Raises:
            ApiError: it contradicts itself, or its schema, expression, grammar or tools cannot be used; says why.
        """
        found = constraint(
            Wishes(
                request.response_format,
                request.structured_outputs,
                request.guided_json,
                request.guided_regex,
                request.guided_choice,
                request.guided_grammar,
            )
        )
        wanted, param = found or (None, "")
        tools: Tools | None = None
        if isinstance(request, ChatRequest):
            tools = tools_of(request.tools, request.tool_choice, request.parallel_tool_calls)
        if tools is not None and tools.forced:
            if wanted is not None:
                raise bad_request(f"{param} and a tool_choice that forces a call contradict each other", param)
            wanted, param = calls_constraint(tools, self._format, self._text.special_token), "tools"
        elif tools is not None and wanted is not None:
            both = answer_or_calls(wanted, tools, self._format, self._text.special_token)
            # Where a call could not be told from such an answer there is none.
            wanted, tools = both or wanted, tools if both else None
        if wanted is not None:
            await self._check(wanted, param, opts)
        return Form(wanted, tools)

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

    def reader(self, form: Form, prompt: str, name: str) -> ChatReader:
        """Reads what an answer says that follows ``prompt``; ``name`` tells it from all others."""
        think = ThinkReader(opened=prompt.rstrip().endswith(OPEN)) if self._thinks else None
        tools = None if form.tools is None else ToolReader(self._format, form.tools.names)
        parallel = form.tools is None or form.tools.parallel
        return ChatReader(think, tools, parallel=parallel, call_id=lambda index: self._call_id(f"{name}-{index}"))

    def _call_id(self, name: str) -> str:
        digest = int.from_bytes(blake3(name.encode()).digest(24))
        letters = _base(digest, 24)
        return letters[:MISTRAL_ID_CHARACTERS] if self._format == "mistral" else f"call_{letters}"

    async def _check(self, wanted: Constraint, param: str, opts: Options) -> None:
        for name, given in (("min_tokens", opts.min_tokens > 0), ("ignore_eos", opts.ignore_eos)):
            if given:
                raise bad_request(f"{name} contradicts {param}, which alone says where the answer ends", name)
        try:
            await self._grammars.check(wanted)
        except InvalidRequest as error:
            raise bad_request(str(error), param, "invalid_grammar") from None


def _base(number: int, length: int) -> str:
    """The lowest ``length`` digits of ``number``, in letters and digits."""
    digits: list[str] = []
    for _ in range(length):
        number, digit = divmod(number, len(_LETTERS))
        digits.append(_LETTERS[digit])
    return "".join(digits)
