"""Which trace a call belongs to, by what clients already send. Pure."""

import random
import re
from collections.abc import Callable, Mapping

import msgspec
from blake3 import blake3

from router.calls.call import TraceFields
from router.calls.errors import invalid
from router.calls.urgency import Urgency
from tracehaul.wire.ids import NodeId, TraceId

ID_CHARACTERS_MAX = 128
_ID = re.compile(rf"[A-Za-z0-9._:/@+=-]{{1,{ID_CHARACTERS_MAX}}}", re.ASCII)

SESSION_HEADERS = (
    "x-dynamo-session-id",
    "x-claude-code-session-id",
    "session-id",
    "x-session-id",
    "x-session-affinity",
    "x-correlation-id",
)
"""Headers by which other clients name a session, the most specific first."""


class Identity(msgspec.Struct, frozen=True):
    """A call's place among the others."""

    trace: TraceId
    parent: TraceId | None
    final: bool
    decode: NodeId | None = None
    """The decode worker that an operator asked for."""
    agent: str = ""
    urgency: Urgency = Urgency()
    tools: tuple[str, ...] = ()
    """As in :class:`router.calls.conversation.Lineage`."""


def identify(
    headers: Mapping[str, str], fields: TraceFields, answered: Callable[[str], TraceId | None], fresh: str
) -> Identity:
    """The trace that a call belongs to: our own header first, then what is likeliest to mean one task.

    Args:
        headers: what came beside the body; looked up by lower-case name.
        fields: the body's part.
        answered: the trace that an earlier response was given in.
        fresh: the trace of a call that says nothing.

    Raises:
        CallFailed: one of our own headers holds what is no id.
    """
    trace = _own(headers, "x-trace-id") or _metadata(fields) or _session(headers)
    if trace is None and fields.previous_response_id:
        trace = answered(fields.previous_response_id)
    if trace is None and fields.prompt_cache_key:
        trace = foreign_id(fields.prompt_cache_key)
    parent = _own(headers, "x-parent-trace-id")
    if parent is None and (session := headers.get("x-dynamo-parent-session-id")):
        parent = foreign_id(session)
    final = _flag(headers, "x-trace-final") or _flag(headers, "x-dynamo-session-final")
    decode = headers.get("x-decode-worker")
    return Identity(trace or TraceId(fresh), parent, final, NodeId(decode) if decode else None)


def fresh_name(dice: random.Random) -> str:
    """A name that nobody has had."""
    return f"{dice.getrandbits(128):032x}"


def foreign_id(value: str) -> TraceId:
    """A name given by others as an id of ours: itself if it is one, else its hash."""
    if _ID.fullmatch(value):
        return TraceId(value)
    return TraceId("h-" + blake3(value.encode(errors="surrogatepass")).hexdigest(16))


def _own(headers: Mapping[str, str], name: str) -> TraceId | None:
    value = headers.get(name)
    if value is None:
        return None
    if not _ID.fullmatch(value):
        raise invalid(f"{name} must be 1 to {ID_CHARACTERS_MAX} letters, digits or any of . _ : / @ + = -", param=name)
    return TraceId(value)


def _metadata(fields: TraceFields) -> TraceId | None:
    value = fields.metadata.get("trace_id") if fields.metadata else None
    return foreign_id(value) if isinstance(value, str) and value else None


def _session(headers: Mapping[str, str]) -> TraceId | None:
    for name in SESSION_HEADERS:
        value = headers.get(name)
        if value:
            return foreign_id(value)
    return None


def _flag(headers: Mapping[str, str], name: str) -> bool:
    return headers.get(name, "").strip().lower() in ("1", "true", "yes")
