"""The object around every answer and every chunk of OpenAI's older dialects. Pure."""

from collections.abc import Sequence
from typing import Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from router.calls.text import Text
from router.dialects.openai.usage import UsageField
from tracehaul import __version__

Tier = Literal["default", "flex"]


def tier_used(asked: str | None) -> Tier:
    """How a call runs that asks for that ``service_tier``."""
    return "flex" if asked == "flex" else "default"


class Told(msgspec.Struct, frozen=True):
    """What became of fields of the request, where it had them; null: nothing."""

    service_tier: Tier | UnsetType = UNSET
    store: UnsetType | None = UNSET
    reasoning_effort: str | UnsetType | None = UNSET
    priority: UnsetType | None = UNSET


def priority_told(wanted: int | None) -> UnsetType | None:
    """What an answer says of a call's priority, which travels with its steps and decides nothing yet."""
    return UNSET if wanted is None else None


class Head(msgspec.Struct, frozen=True):
    """What is the same in every object of one call."""

    id: str
    created: int
    model: str
    fingerprint: str
    told: Told = Told()


def fingerprint(text: Text) -> str:
    """What an answer's tokens depend on beside its call: the model's files and this build."""
    return f"fp_{text.revision or 'unknown'}_{__version__}"


C = TypeVar("C", bound=msgspec.Struct)


class Response(msgspec.Struct, Generic[C], frozen=True):
    """Every answer and every chunk of a generation; chunks of a stream without usage leave it out."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk", "text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: Sequence[C]
    usage: UsageField = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    service_tier: Tier | UnsetType | None = UNSET
    store: bool | UnsetType | None = UNSET
    reasoning_effort: str | UnsetType | None = UNSET
    priority: UnsetType | None = UNSET


class Frame(msgspec.Struct, frozen=True):
    """An event of which one part alone changes: what comes before that part, and after it."""

    head: bytes
    tail: bytes

    def around(self, part: bytes) -> bytes:
        """The event with that part."""
        return b"".join((self.head, part, self.tail))


def frame(event: bytes, hole: bytes) -> Frame:
    """An event in two, so that its constant parts are encoded once. ``hole``: the part, which is the last of its kind;
    what follows it holds nothing that a client or a model wrote."""
    head, found, tail = event.rpartition(hole)
    assert found
    return Frame(head, tail)
