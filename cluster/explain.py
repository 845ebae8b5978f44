"""``tracehaul explain``: one trace's story, or a worker's, from the router, or from what it wrote down."""

from collections.abc import Callable
from urllib.parse import quote

import msgspec

from cluster.api import Api
from cluster.decision_file import Line, lines_of, noted_of
from cluster.rundir import ClusterFault, RunDir
from router.adapt.story import story as changes_story
from router.http.roles import Changes
from router.traces.story import events, story
from router.traces.views import DecisionView, TraceView
from tracehaul.runtime import clock
from tracehaul.wire.ids import NodeId

TIMEOUT_S = 5.0
NOT_FOUND = 404


class Written(msgspec.Struct, frozen=True):
    """What there is of a trace that the router does not tell of."""

    id: str
    why: str
    """The router does not tell."""
    file: str
    decisions: list[Line]


def explain(ask: Callable[[], Api], trace: str, salt: str, run: RunDir | None) -> list[str]:
    """The story's lines.

    Args:
        ask: how the router is reached; may raise ClusterFault.
        trace: which; a worker's name where there is no such trace.
        salt: its tenant's.
        run: where a router of this machine writes down what it decides.

    Raises:
        ClusterFault: the router does not tell, and nothing is written down.
    """
    told = _fetch_or_read(ask, trace, salt, run)
    if isinstance(told, Changes):
        lines = changes_story(told.changes, told.node, told.now_s)
        return lines or [f"{told.node} has the role that it was given: the router has not changed it by itself."]
    if isinstance(told, bytes):
        try:
            return story(msgspec.json.decode(told, type=TraceView))
        except msgspec.DecodeError as error:
            raise ClusterFault(f"the router answers, but is not of this version: {error}") from error
    now_s = clock.wall_s()
    views = [DecisionView(max(0.0, now_s - line.at_s), line.decision) for line in told.decisions]
    return [f"{told.why}. What was written down of it ({told.file}):", *events(views)]


def explain_json(ask: Callable[[], Api], trace: str, salt: str, run: RunDir | None) -> bytes:
    """What is known, as JSON: the router's view of the trace, a :class:`Written`, or a worker's :class:`Changes`.

    Raises:
        ClusterFault: as :func:`explain`.
    """
    told = _fetch_or_read(ask, trace, salt, run)
    return told if isinstance(told, bytes) else msgspec.json.encode(told)


def _fetch_or_read(ask: Callable[[], Api], trace: str, salt: str, run: RunDir | None) -> bytes | Written | Changes:
    try:
        return _fetch(ask(), trace, salt)
    except ClusterFault as fault:
        if (changes := _changes(ask, trace, run)) is not None:
            return changes
        if run is None:
            raise
        file = run.decisions()
        try:
            lines = lines_of(file, trace, salt)
        except OSError as error:
            raise ClusterFault(f"{fault}; and what it wrote down cannot be read: {error}") from fault
        if not lines:
            raise ClusterFault(f"{fault}; and {file} has nothing of it") from fault
        return Written(trace, str(fault), str(file), lines)


def _changes(ask: Callable[[], Api], node: str, run: RunDir | None) -> Changes | None:
    """What became of a worker's role: as the router tells, or as one wrote it down; None: there is no such node."""
    told = None
    try:
        answer = ask().get(f"/cluster/{quote(node, safe='')}/changes", TIMEOUT_S)
        if not answer.is_error:
            told = msgspec.json.decode(answer.content, type=Changes)
    except (ClusterFault, msgspec.DecodeError):
        pass
    if run is None or (told is not None and told.changes):
        return told
    try:
        noted = noted_of(run.decisions(), node)
    except OSError:
        return told
    return Changes(NodeId(node), clock.wall_s(), noted) if noted else told


def _fetch(api: Api, trace: str, salt: str) -> bytes:
    """What the router knows of a trace, as JSON.

    Raises:
        ClusterFault: no router answers there, or it does not know the trace.
    """
    answer = api.get(f"/v1/traces/{quote(trace, safe='')}", TIMEOUT_S, {"cache_salt": salt})
    if answer.status_code == NOT_FOUND:
        whose = f" of tenant {salt!r}" if salt else ""
        raise ClusterFault(
            f"the router knows no trace {trace!r}{whose}: GET {api.url}/v1/traces lists those that it knows"
        )
    if answer.is_error:
        raise ClusterFault(f"the router at {api.url} refuses: {answer.text[:500]}")
    return answer.content
