"""Which trace a call belongs to, by what clients already send. Pure."""

import random
import re
from collections.abc import Callable, Mapping

import msgspec
from blake3 import blake3

from router.calls.call import TraceFields
from router.calls.errors import invalid
from router.calls.urgency import Urgency
from router.policy.prices import UNLIMITED, Limits
from tracehaul.wire.ids import NodeId, TraceId

ID_CHARACTERS_MAX = 128
_ID = re.compile(rf"[A-Za-z0-9._:/@+=-]{{1,{ID_CHARACTERS_MAX}}}", re.ASCII)


class Names(msgspec.Struct, frozen=True):
    """Headers by which one kind of client names what its calls belong to; with underscores for dashes, too."""

    session: str
    within: str | None = None
    """Of what that is a part: its parent, where no other is named."""
    agent: str | None = None
    """Of the session's agents but the first, whose calls name the session as well: each is a trace of its own."""
    parent_agent: str | None = None


NAMES = (
    Names("x-dynamo-session-id"),
    Names("x-dynamo-trajectory-id"),
    Names("x-claude-code-session-id", None, "x-claude-code-agent-id", "x-claude-code-parent-agent-id"),
    # Codex: the threads of a session share its id, which is that of the first.
    Names("thread-id", "session-id"),
    Names("session-id"),
    Names("x-session-id"),
    Names("x-session-affinity"),
    Names("x-correlation-id"),
)
"""The most specific first."""
PARENTS = (
    "x-dynamo-parent-session-id",
    "x-dynamo-parent-trajectory-id",
    "x-codex-parent-thread-id",
    "x-parent-session-id",
)
"""Of all kinds, the first of these that is there."""
_THEIRS = frozenset(
    spelled for name in (*PARENTS, *(names.session for names in NAMES)) for spelled in (name, name.replace("-", "_"))
)
"""A call without any of these names nothing."""
FINAL = ("x-trace-final", "x-dynamo-session-final", "x-dynamo-trajectory-final")


class Identity(msgspec.Struct, frozen=True):
    """A call's place among the others."""

    trace: TraceId
    parent: TraceId | None
    final: bool
    decode: NodeId | None = None
    """The decode worker that an operator asked for."""
    agent: str = ""
    urgency: Urgency = Urgency()
    limits: Limits = UNLIMITED
    """Of its trace, as far as it says any."""
    tools: tuple[str, ...] = ()
    """As in :class:`router.calls.conversation.Lineage`."""
    beginning: bytes = b""
    """Where messages alone name the trace: the digest of all of them."""
    named: bool = False
    """The client names the trace."""


def identify(
    headers: Mapping[str, str], fields: TraceFields, answered: Callable[[str], TraceId | None], fresh: str
) -> Identity:
    """The trace that a call belongs to: our own names first, then what is likeliest to mean one task.

    Args:
        headers: what came beside the body; looked up by lower-case name.
        fields: the body's part.
        answered: the trace that an earlier response was given in.
        fresh: the trace of a call that says nothing.

    Raises:
        CallFailed: one of our own headers holds what is no id.
    """
    named, named_parent = _named(headers, fields)
    trace = _own(headers, "x-trace-id") or _metadata(fields) or named
    if trace is None and fields.previous_response_id:
        trace = answered(fields.previous_response_id)
    if trace is None and fields.prompt_cache_key:
        trace = foreign_id(fields.prompt_cache_key)
    if trace is None and fields.baseline:
        trace = answered(fields.baseline)
    parent = _own(headers, "x-parent-trace-id") or named_parent
    final = any(_flag(headers, name) for name in FINAL)
    decode = headers.get("x-decode-worker")
    return Identity(
        trace or TraceId(fresh), parent if parent != trace else None, final, NodeId(decode) if decode else None
    )


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


def _named(headers: Mapping[str, str], fields: TraceFields) -> tuple[TraceId | None, TraceId | None]:
    """The trace and its parent, in the client's own words for them."""
    if fields.session:
        return foreign_id(fields.session), foreign_id(fields.parent) if fields.parent else None
    if _THEIRS.isdisjoint(headers):
        return None, None
    session, parent = None, next((value for name in PARENTS if (value := _value(headers, name))), None)
    for names in NAMES:
        session = _value(headers, names.session)
        if session is None:
            continue
        parent = parent or _value(headers, names.within)
        agent, parent_agent = _value(headers, names.agent), _value(headers, names.parent_agent)
        if agent is not None:
            parent = session if parent_agent is None else f"{session}:{parent_agent}"
            session = f"{session}:{agent}"
        break
    return None if session is None else foreign_id(session), None if parent is None else foreign_id(parent)


def _value(headers: Mapping[str, str], name: str | None) -> str | None:
    """What that header says, if it says something."""
    if name is None:
        return None
    return (headers.get(name) or headers.get(name.replace("-", "_")) or "").strip() or None


def _flag(headers: Mapping[str, str], name: str) -> bool:
    return headers.get(name, "").strip().lower() in ("1", "true", "yes")
