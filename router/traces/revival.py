"""Traces that were written down by a router that is gone, made ready to live on. Pure."""

from collections.abc import Container, Iterator, Mapping

from msgspec.structs import replace

from router.traces.alarms import Alarm
from router.traces.changes import Clock, Read, elapsed_s, retimed
from router.traces.events import Answered, StepEnded
from router.traces.trace import Trace, TraceKey, with_kept

ROUTER_LOST = "router_lost"
"""How a step ended that ran when its router did."""


def revived(
    found: Mapping[TraceKey, Read], known: Container[TraceKey], keep_s: float, now: Clock, editions: Mapping[str, str]
) -> Iterator[tuple[Trace, list[Alarm]]]:
    """Those that live on, in the order in which they last changed: not what changed longer than ``keep_s`` ago, not
    what is ``known`` by now. What was to come back by now is not waited for any more. Texts whose model is of another
    edition by now are left out: their tokens say something else to it. (Contexts name theirs by their root.)"""
    lives = {
        key: read
        for key, read in sorted(found.items(), key=lambda item: item[1].clock.wall_s)
        if key not in known and read.trace.steps_count and elapsed_s(read.clock, now) <= keep_s
    }
    for key, read in lives.items():
        children = tuple(
            name
            for name in read.trace.children
            if (child := lives.get((key[0], name))) is not None and child.trace.parent == key[1]
        )
        trace, planned = retimed(read.trace, read.planned, read.clock, now)
        alarms = [Alarm(at_s, key, kind) for at_s, kind in planned if at_s > now.now_s or kind == "deadline"]
        texts = [text for text in trace.texts if read.editions.get(text.model) == editions.get(text.model)]
        if len(texts) < len(trace.texts):
            trace = with_kept(trace, trace.lefts, texts)
        yield replace(trace, children=children, calls_open=0), alarms


def lost(trace: Trace) -> Iterator[StepEnded | Answered]:
    """What has to happen to a trace that lives on: its steps ended with the router."""
    for step in trace.running:
        yield StepEnded(trace.key, step.step, ROUTER_LOST, 0, None, None, trace.reload_token_s, final=False)
    for step in trace.unanswered:
        yield Answered(trace.key, step)
