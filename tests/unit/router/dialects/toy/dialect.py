"""A dialect that nobody speaks: what one more costs. Lines in, lines out; it knows the neutral call and nothing else.

A body is the model, then ``live`` or ``whole``, then ``who: words`` for each message, and ``tool: name`` for each tool.
"""

from collections.abc import Iterable, Sequence

from router.calls.call import Call, Conversation, Message, Options
from router.calls.errors import CallFailed, invalid
from router.calls.events import Begun, CallEvent, Choice, Ended, Piece, Usage
from router.calls.tools import Function, Tools
from router.dialects.base import Models

ROLES = {"you": "user", "me": "assistant", "all": "system"}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


class ToyTeller:
    def events(self, events: Iterable[CallEvent]) -> bytes:
        return "".join(map(self._line, events)).encode()

    def end(self, usage: Usage) -> bytes:
        return f"spent {usage.output_tokens}\n".encode()

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        calls = "".join(f"call {call.name} {call.arguments}\n" for choice in choices for call in choice.said.calls)
        return f"{choices[0].said.content}\n{calls}{choices[0].reason}\n".encode() + self.end(usage)

    def _line(self, event: CallEvent) -> str:
        match event:
            case Begun():
                return "begin\n"
            case Piece(said=said):
                return f"+{said.content}\n" if said.content else ""
            case Ended(reason=reason):
                return f"{reason}\n"


class Toy:
    keepalive = b"...\n"

    def read(self, body: bytes, fresh: str, created: int, models: Models) -> tuple[Call, ToyTeller]:
        model, how, *lines = body.decode().splitlines()
        if how not in ("live", "whole"):
            raise invalid(f"neither live nor whole: {how}", "line 2")
        forced = tuple(Function(line.removeprefix("tool: ")) for line in lines if line.startswith("tool: "))
        said = [line.split(": ", 1) for line in lines if not line.startswith("tool: ")]
        messages = tuple(Message(ROLES[who], words) for who, words in said)  # type: ignore[arg-type]
        call = Call(
            id=f"toy-{fresh}",
            model=models.named(model),
            prompts=(Conversation(messages),),
            where="lines",
            options=Options(stream=how == "live"),
            tools=Tools(forced, forced, True, [TOOL]) if forced else None,
        )
        return call, ToyTeller()

    def failed(self, failure: CallFailed) -> bytes:
        return f"no: {failure} ({failure.cause}, {failure.param})\n".encode()

    def broken(self, failure: CallFailed) -> bytes:
        return b"broken\n" + self.failed(failure)
