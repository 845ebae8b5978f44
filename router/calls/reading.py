"""What an answer's text says: reasoning, content, calls of tools. Pure."""

from collections.abc import Callable, Sequence

import msgspec

from router.calls.events import NOTHING, Said, SaidCall
from router.calls.reasoning import ThinkReader
from router.calls.tool_formats import CallArguments, CallStart, Content, Event, ToolReader


class AnswerReader:
    """Reads one answer as it grows.

    Args:
        think: takes reasoning out; None where there is none.
        tools: takes calls out; None where there are no tools to call.
        parallel: False: calls after the first are left out.
        call_id: the id of a call, by its number.
    """

    def __init__(
        self,
        think: ThinkReader | None = None,
        tools: ToolReader | None = None,
        *,
        parallel: bool = True,
        call_id: Callable[[int], str] = str,
    ) -> None:
        self._think = think
        self._tools = tools
        self._parallel = parallel
        self._call_id = call_id
        self._tokens = 0
        self._parts: list[Said] = []
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
        """The message so far, each call in one piece."""
        calls: dict[int, SaidCall] = {}
        for part in self._parts:
            for call in part.calls:
                known = calls.get(call.index)
                arguments = call.arguments if known is None else known.arguments + call.arguments
                calls[call.index] = msgspec.structs.replace(known or call, arguments=arguments)
        return Said(
            "".join(part.reasoning for part in self._parts),
            "".join(part.content for part in self._parts),
            tuple(calls.values()),
        )

    @property
    def called(self) -> bool:
        """Whether it has a call."""
        return any(part.calls for part in self._parts)

    def _keep(self, reasoning: str, events: Sequence[Event]) -> Said:
        content: list[str] = []
        calls: list[SaidCall] = []
        for event in events:
            match event:
                case Content(text):
                    content.append(text)
                case CallStart(index, name) if index == 0 or self._parallel:
                    calls.append(SaidCall(index, self._call_id(index), name, ""))
                case CallArguments(index, text) if index == 0 or self._parallel:
                    calls.append(SaidCall(index, None, None, text))
                case _:
                    pass
        if not (reasoning or content or calls):
            return NOTHING
        return self._told(Said(reasoning, "".join(content), tuple(calls)))

    def _told(self, said: Said) -> Said:
        self._parts.append(said)
        return said
