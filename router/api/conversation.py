"""What a chat call's messages say of its trace: what it continues, what kind of agent it is, what ran before it."""

from collections.abc import Sequence

import msgspec
from blake3 import blake3

from router.api.requests import ChatMessage, ChatRequest
from router.traces.prefixes import digests

TOOLS_MAX = 16
NAME_CHARACTERS_MAX = 64

_encode = msgspec.json.Encoder().encode


class Conversation(msgspec.Struct, frozen=True):
    """One call's messages, seen as a part of its trace."""

    digests: list[bytes]
    """Of each beginning of them: see :mod:`router.traces.prefixes`."""
    opening: int
    """How many of the first messages are the system's, so that many traces share them."""
    agent: str
    """Names the kind of agent: the same for calls with the same opening and the same tools."""
    called: tuple[str, ...]
    """Names of the tools that the last answer in it called; empty: it called none."""


def conversation(request: ChatRequest, salt: str) -> Conversation:
    """What the request's messages say."""
    messages = [_encode(message) for message in request.messages]
    opening = next((i for i, m in enumerate(request.messages) if m.role not in ("system", "developer")), len(messages))
    kind = blake3(b"|".join([_encode(_tool_names(request)), *messages[:opening]]))
    return Conversation(digests(salt, messages), opening, kind.hexdigest(8), called(request.messages))


def called(messages: Sequence[ChatMessage]) -> tuple[str, ...]:
    """Names of the tools that the last answer called."""
    answer = next((message for message in reversed(messages) if message.role == "assistant"), None)
    calls = answer.tool_calls if answer is not None else None
    return names_of([call.function.name for call in calls or ()])


def names_of(calls: Sequence[str]) -> tuple[str, ...]:
    """The tools that a list of calls names, each once and cut to a size that can be remembered."""
    return tuple(dict.fromkeys(name[:NAME_CHARACTERS_MAX] for name in calls[:TOOLS_MAX]))


def _tool_names(request: ChatRequest) -> list[str]:
    names: list[str] = []
    for tool in request.tools or ():
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            names.append(name)
    return sorted(names)
