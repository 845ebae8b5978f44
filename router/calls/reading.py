"""What an answer's text says: reasoning, content, calls of tools. Pure."""

from collections.abc import Callable, Sequence

import msgspec

from router.calls.custom import InputReader
from router.calls.events import NOTHING, Said, SaidCall
from router.calls.reasoning import ThinkReader
from router.calls.tool_formats import CallArguments, CallBroken, CallEnd, CallStart, Content, Event, ToolReader


class AnswerReader:
    """Reads one answer as it grows.

    Args:
        think: takes reasoning out; None where there is none.
        tools: takes calls out; None where there are no tools to call.
        parallel: False: calls after the first are left out.
        customs: names of the tools that take a text instead of arguments.
        call_id: the id of a call, by its number and the id that the model gave it, if it did.
    """

    def __init__(
        self,
        think: ThinkReader | None = None,
        tools: ToolReader | None = None,
        *,
        parallel: bool = True,
        customs: frozenset[str] = frozenset(),
        call_id: Callable[[int, str], str] = lambda at, given: given or str(at),
    ) -> None:
        self._think = think
        self._tools = tools
        self._parallel = parallel
        self._customs = customs
        self._call_id = call_id
        self._tokens = 0
        self._parts: list[Said] = []
        self._open: set[int] = set()
        """Calls that are not complete."""
        self._broken: set[int] = set()
        """What was told as calls, and is none."""
        self._inputs: dict[int, InputReader] = {}
        """Of the calls of custom tools."""
        self.reasoning_tokens = 0
        """Tokens up to the end of the reasoning."""

    def feed(self, text: str, tokens: int) -> Said:
        """The next ``tokens`` tokens, and the text that they complete."""
        if self._think is None and self._tools is None:
            return self._told(Said(content=text)) if text else NOTHING
        self._tokens += tokens
        reasoning = ""
        if self._think is not None:
            before = self._think.thinking
            thought = self._think.feed(text)
            reasoning, text = thought.reasoning, thought.text
            if before or reasoning or self._think.thinking:
                self.reasoning_tokens = self._tokens
        return self._keep(reasoning, [Content(text)] if self._tools is None else self._tools.feed(text))

    def finish(self) -> Said:
        """The text ended: what is still held back."""
        reasoning, text = "", ""
        if self._think is not None:
            thought = self._think.finish()
            reasoning, text = thought.reasoning, thought.text
        tools = self._tools
        return self._keep(reasoning, [Content(text)] if tools is None else [*tools.feed(text), *tools.finish()])

    @property
    def whole(self) -> Said:
        """The message so far, each call in one piece; what turned out to be no call is content alone."""
        calls: dict[int, SaidCall] = {}
        for part in self._parts:
            for call in part.calls:
                known = calls.get(call.index)
                arguments = call.arguments if known is None else known.arguments + call.arguments
                calls[call.index] = msgspec.structs.replace(known or call, arguments=arguments)
        return Said(
            "".join(part.reasoning for part in self._parts),
            "".join(part.content for part in self._parts),
            tuple(call for index, call in calls.items() if index not in self._broken),
        )

    @property
    def called(self) -> bool:
        """Whether :attr:`whole` has calls, all of them complete: their arguments are objects."""
        return not self._open and any(call.index not in self._broken for part in self._parts for call in part.calls)

    @property
    def called_in_pieces(self) -> bool:
        """The same of all that was told on the way."""
        return self.called and not self._broken

    def _keep(self, reasoning: str, events: Sequence[Event]) -> Said:
        content: list[str] = []
        calls: list[SaidCall] = []
        for event in events:
            if isinstance(event, Content):
                content.append(event.text)
            elif event.index == 0 or self._parallel:
                self._call(event, calls)
        if not (reasoning or content or calls):
            return NOTHING
        return self._told(Said(reasoning, "".join(content), tuple(calls)))

    def _call(self, event: CallStart | CallArguments | CallEnd | CallBroken, calls: list[SaidCall]) -> None:
        index = event.index
        reader = self._inputs.get(index)
        match event:
            case CallStart(name=name, id=given):
                self._open.add(index)
                if name in self._customs:
                    self._inputs[index] = InputReader()
                calls.append(SaidCall(index, self._call_id(index, given), name, "", name in self._customs))
            case CallArguments(text=text):
                if told := text if reader is None else reader.feed(text):
                    calls.append(SaidCall(index, None, None, told, reader is not None))
            case CallEnd():
                self._open.discard(index)
                if reader is not None and (told := reader.finish()):
                    calls.append(SaidCall(index, None, None, told, custom=True))
            case CallBroken():
                self._open.discard(index)
                self._broken.add(index)

    def _told(self, said: Said) -> Said:
        self._parts.append(said)
        return said
