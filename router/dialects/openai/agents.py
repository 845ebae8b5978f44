"""The agent that a body says it is of, in the words of vLLM's plugins and of others' proposals. Pure.

None of them is settled, so whatever names something is taken, and what does not is passed over.
"""

from typing import Any

import msgspec

CONTEXT_CHARACTERS_MAX = 16384
TRACES = ("trace_id", "program_id")
"""Fields that name one agent's task."""
SESSIONS = ("session_id", "task_id")
"""Fields that name what agents do together, of which ``agent_id`` is one."""
PARENTS = ("parent_trace_id", "parent_program_id", "parent_session_id", "parent_id")


class Named(msgspec.Struct, frozen=True):
    """As in :class:`router.calls.call.TraceFields`."""

    session: str | None = None
    parent: str | None = None


def named_by(*contexts: Any) -> Named:
    """What the first of these names that names something: objects, or the JSON of one."""
    for context in contexts:
        fields = _object(context)
        parent = _first(fields, PARENTS)
        if (trace := _first(fields, TRACES)) is not None:
            return Named(trace, parent)
        if (session := _first(fields, SESSIONS)) is not None:
            agent = _first(fields, ("agent_id",))
            if agent is None:
                return Named(session, parent)
            whole = agent if agent.startswith(f"{session}:") else f"{session}:{agent}"
            return Named(whole, parent or session)
    return Named()


def _object(context: Any) -> dict[str, Any]:
    if isinstance(context, str) and len(context) <= CONTEXT_CHARACTERS_MAX:
        try:
            context = msgspec.json.decode(context)
        except (ValueError, RecursionError):
            return {}
    return context if isinstance(context, dict) else {}


def _first(fields: dict[str, Any], names: tuple[str, ...]) -> str | None:
    values = (fields.get(name) for name in names)
    return next((value for value in values if isinstance(value, str) and value), None)
