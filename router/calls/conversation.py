"""What a conversation says of its trace: what it continues, what kind of agent it is, what ran before it. Pure."""

from collections.abc import Sequence

import msgspec
from blake3 import blake3

from router.calls.call import Conversation, Message
from router.calls.story import canonical
from router.traces.prefixes import Heard, Sought, digests

TOOLS_MAX = 16
NAME_CHARACTERS_MAX = 64

_encode = msgspec.json.Encoder().encode


class Lineage(msgspec.Struct, frozen=True):
    """One call's messages, seen as a part of its trace."""

    agent: str
    """Names the kind of agent: the same for calls with the same opening and the same tools."""
    called: tuple[str, ...]
    """Names of the tools that the last answer in it called; empty: it called none."""


def lineage(conversation: Conversation) -> Lineage:
    """What the messages say."""
    messages = conversation.messages
    kind = blake3(b"|".join([_encode(sorted(conversation.kit)), *map(_encode, messages[: opening(messages)])]))
    return Lineage(kind.hexdigest(8), called(messages))


def opening(messages: Sequence[Message]) -> int:
    """How many of the first messages are the system's, so that many traces share them."""
    return next((at for at, message in enumerate(messages) if message.role != "system"), len(messages))


def beginnings(conversation: Conversation, tenant: str) -> list[bytes]:
    """Digests of each beginning of the messages, to find their trace by: see :mod:`router.traces.prefixes`."""
    return digests(tenant, map(_encode, conversation.messages))


def heard(conversation: Conversation, beginnings: Sequence[bytes]) -> Heard | None:
    """The last answer in it; None: there is none. ``beginnings``: its own."""
    messages = conversation.messages
    at = next((at for at in range(len(messages) - 1, -1, -1) if messages[at].role == "assistant"), None)
    if at is None:
        return None
    answer = messages[at]
    calls = [(call.name, call.arguments) for call in answer.tool_calls]
    return Heard(at, answer_name(beginnings[at - 1] if at else b"", answer.content, calls))


def sought(conversation: Conversation, tenant: str) -> Sought:
    """What its trace is found by."""
    begun = beginnings(conversation, tenant)
    answer = heard(conversation, begun)
    return Sought(begun, opening(conversation.messages), answer is None, answer)


def answer_name(before: bytes, content: str, calls: Sequence[tuple[str, str]]) -> str:
    """Names an answer, told by the last of the :func:`beginnings` of what it answers, so that it is known again: by
    what it says and which tools it calls with which arguments, however a client spells them, and without its reasoning.
    """
    spelled = [(name, canonical(arguments)) for name, arguments in calls]
    return "heard-" + blake3(before + _encode((content.strip(), spelled))).hexdigest(16)


def called(messages: Sequence[Message]) -> tuple[str, ...]:
    """Names of the tools that the last answer called."""
    answer = next((message for message in reversed(messages) if message.role == "assistant"), None)
    return names_of([call.name for call in answer.tool_calls] if answer is not None else [])


def names_of(calls: Sequence[str]) -> tuple[str, ...]:
    """The tools that a list of calls names, each once and cut to a size that can be remembered."""
    return tuple(dict.fromkeys(name[:NAME_CHARACTERS_MAX] for name in calls[:TOOLS_MAX]))
