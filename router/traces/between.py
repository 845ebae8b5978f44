"""What becomes of a trace's context between two of its steps: decided once it is idle and all is known of what it did,
or when its client says something. Pure.
"""

from collections.abc import Sequence

from msgspec.structs import replace

from router.policy.gaps import Gap, Gaps, certain
from router.policy.retention import Retention, RetentionConfig, Situation, decide
from router.traces.alarms import Alarm, Alarms
from router.traces.decisions import Asked, Decision, Entry, Retained, log_with
from router.traces.effects import BringBack, Effect, EndPin, FreeContext, SetPin, StopPrefetch, Told
from router.traces.events import Suspended
from router.traces.trace import Suspension, Trace, TraceKey, with_kept
from tracehaul.wire.ids import NodeId, TraceId


class Between:
    """The part of :class:`router.traces.machine.Traces` that plans; what it plans for later it enters in ``alarms``."""

    def __init__(self, config: RetentionConfig, gaps: Gaps, alarms: Alarms) -> None:
        self._config = config
        self._gaps = gaps
        self._alarms = alarms

    def settled(self, trace: Trace, now_s: float, effects: list[Effect]) -> Trace:
        """Once all is known of what it did, its context's future is decided: once for each time that it becomes
        idle."""
        if trace.state != "acting" or trace.unanswered or trace.decided or not trace.lefts:
            return trace
        assert trace.idle_since_s is not None
        gap = self._gaps.expect(trace.agent, trace.calls)
        return self._retained(replace(trace, decided=True), gap, None, now_s, trace.idle_since_s, effects)

    def suspended(self, trace: Trace, event: Suspended, now_s: float, effects: list[Effect]) -> Trace:
        """The client says that it is idle."""
        if trace.state not in ("acting", "suspended"):
            return trace
        expected_s, deadline_s, tool = event.expected_s, event.deadline_s, event.tool
        said = {"expected_s": expected_s, "deadline_s": deadline_s, "tool": tool}
        trace = noted(trace, Asked("suspend", said), now_s, effects)
        suspension = Suspension(now_s, expected_s, deadline_s, tool)
        trace = replace(trace, suspension=suspension, calls=(tool,) if tool is not None else trace.calls)
        told_s = deadline_s if deadline_s is not None else 2 * expected_s
        trace = self._retained(trace, certain(expected_s), told_s, now_s, now_s, effects)
        if deadline_s is not None:
            self._alarms.add(Alarm(now_s + deadline_s, trace.key, "deadline"))
        return trace

    def resumed(self, trace: Trace, now_s: float, effects: list[Effect]) -> Trace:
        """The client says that its next step comes soon."""
        if trace.state not in ("acting", "suspended"):
            return trace
        self._alarms.clear(trace.key)
        trace = replace(noted(trace, Asked("resume", {}), now_s, effects), suspension=None)
        self._bring_back(trace, "the client resumes it", effects, told=True)
        return trace

    def _retained(
        self, trace: Trace, gap: Gap, told_s: float | None, now_s: float, since_s: float, effects: list[Effect]
    ) -> Trace:
        """Decide what becomes of a context in a gap since then, which the client may have told the end of."""
        key = trace.key
        self._alarms.clear(key)
        effects.append(StopPrefetch(key))
        situation = Situation(trace.context_tokens, trace.context_tokens * trace.reload_token_s)
        returns = told_s is not None or _returns(trace)
        plan = decide(gap, situation, self._config, returns=returns, told_s=told_s, keep_s=trace.keep_s)
        median_s, longest_s = gap.quantile(0.5), gap.quantile(0.99)
        retained = Retained(trace.calls, gap.seen, median_s, longest_s, situation, plan)
        trace = noted(replace(trace, retention=plan), retained, now_s, effects)
        if plan.recall_s is not None:
            kind = "recall" if told_s is None else "recall_told"
            self._alarms.add(Alarm(max(now_s, since_s + plan.recall_s), key, kind))
        return _pinned(trace, plan, now_s, effects, told=told_s is not None)

    def _bring_back(self, trace: Trace, why: str, effects: list[Effect], *, told: bool) -> None:
        if self._config.recall and not trace.running and trace.lefts:
            effects.append(BringBack(trace.key, trace.lefts[-1], trace.home, why, told))

    def due(self, trace: Trace, alarm: Alarm, effects: list[Effect]) -> Trace:
        """What was planned for now."""
        if alarm.kind != "deadline":
            self._bring_back(trace, "its next step is expected", effects, told=alarm.kind == "recall_told")
        elif trace.state == "suspended":
            return self.release(with_kept(replace(trace, ended=True, suspension=None), (), ()), effects)
        return trace

    def release(self, trace: Trace, effects: list[Effect], workers: Sequence[NodeId] = ()) -> Trace:
        """What stores and workers keep for it, those ``workers`` and the one of its last step, is freed."""
        key = trace.key
        self._alarms.clear(key)
        effects.append(StopPrefetch(key))
        if trace.home is not None and (self._config.pins or trace.pin is not None):
            effects.append(EndPin(key, _automatic(key), trace.home))
            if trace.pin is not None:
                effects.append(EndPin(key, trace.trace, trace.home))
        last = (trace.worker,) if trace.worker is not None else ()
        effects.extend(FreeContext(key, worker) for worker in dict.fromkeys((*workers, *last)))
        return replace(trace, retention=None, pin=None)


def _returns(trace: Trace) -> bool:
    """It has come back before, waits for tools, or is part of another."""
    return trace.steps_count > 1 or bool(trace.calls) or trace.parent is not None


def noted(trace: Trace, decision: Decision, now_s: float, effects: list[Effect]) -> Trace:
    """With a decision in its log."""
    entry = Entry(now_s, decision)
    effects.append(Told(trace.key, entry))
    return replace(trace, log=log_with(trace.log, entry))


def _pinned(trace: Trace, plan: Retention, now_s: float, effects: list[Effect], *, told: bool) -> Trace:
    """Its last context is pinned as planned; and as its client wishes, where it is not already."""
    last = trace.lefts[-1].last if trace.lefts else None
    key, home, wish = trace.key, trace.home, trace.pin
    if home is None or last is None:
        return trace
    if plan.pin_s > 0:
        effects.append(SetPin(key, _automatic(key), home, last, plan.pin_s, "soft", plan.priority))
    if wish is None or wish.until_s <= now_s or (not told and (wish.home, wish.last) == (home, last)):
        return trace
    effects.append(SetPin(key, trace.trace, home, last, wish.until_s - now_s, wish.kind, wish.priority, wish.replicas))
    return replace(trace, pin=replace(wish, home=home, last=last))


def _automatic(key: TraceKey) -> TraceId:
    """The name of the router's own pin: no client can name it, so it never replaces what a client asked for."""
    return TraceId(f"{key[1]}~")
