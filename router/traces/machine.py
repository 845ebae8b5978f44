"""The traces, as one state machine: events in, effects out. Pure; bounded; lost with the router at the cost of time
only.

All that is known of a trace is one value under one key, with one limit and one way to be forgotten. Nobody else changes
a trace.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from msgspec.structs import replace

from router.policy.gaps import Gaps
from router.policy.retention import RetentionConfig
from router.traces import asks
from router.traces.alarms import Alarm, Alarms
from router.traces.between import Between, noted
from router.traces.contexts import Left, grow, warmed
from router.traces.decisions import Asked, Ended
from router.traces.effects import Effect, StopRecall, StopSteps
from router.traces.events import (
    Answered,
    CallOver,
    Charged,
    ContextRecalled,
    Deleted,
    Elsewhere,
    Event,
    OfKnown,
    PinAsked,
    PinHeld,
    Recognised,
    Resumed,
    StepBegan,
    StepEnded,
    StepGrew,
    StepMoved,
    StepPlaced,
    Suspended,
    Tick,
)
from router.traces.lookups import Lookups
from router.traces.prefixes import Heard, Place
from router.traces.rows import Pause
from router.traces.texts import Text, remember
from router.traces.trace import (
    CHILDREN_MAX,
    UNANSWERED_MAX,
    Step,
    Trace,
    TraceKey,
    past_with,
    used,
    with_kept,
)
from router.traces.uses import Uses
from tracehaul.wire.ids import StepId, TraceId


class Traces:
    """At most ``traces_max`` of them, in ``bytes_max`` bytes: of those in which nothing is under way, the one whose
    last step began first is forgotten first, and whole. Calls that wait take no trace's place."""

    def __init__(self, traces_max: int, bytes_max: int, config: RetentionConfig) -> None:
        assert traces_max > 0
        self.gaps = Gaps()
        """What was learned of all traces' pauses."""
        self.changed: dict[TraceKey, None] | None = None
        """Where somebody writes traces down: those that are another value, or gone, since they were taken from here."""
        self._max = traces_max
        self._bytes_max = bytes_max
        self._traces: OrderedDict[TraceKey, Trace] = OrderedDict()
        self._uses = Uses(self._traces)
        self._alarms = Alarms()
        self._lookups = Lookups()
        self._between = Between(config, self.gaps, self._alarms)

    # --- looking ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._traces)

    def __contains__(self, key: object) -> bool:
        return key in self._traces

    @property
    def nbytes(self) -> int:
        """Memory that they take, about."""
        return self._uses.nbytes + self._uses.waiting_nbytes

    @property
    def next_alarm_s(self) -> float | None:
        """When the next :class:`Tick` is wanted."""
        return self._alarms.next_s

    def get(self, key: TraceKey) -> Trace | None:
        """A trace as it is now; None until its first step begins."""
        trace = self._traces.get(key)
        return trace if trace is not None and trace.steps_count else None

    def all(self) -> Iterator[Trace]:
        """Everybody's, the last used last."""
        return (trace for trace in self._traces.values() if trace.steps_count)

    def of(self, salt: str) -> Iterator[Trace]:
        """A tenant's traces, the last used first."""
        return (t for key, t in reversed(self._traces.items()) if key[0] == salt and t.steps_count)

    def page(self, salt: str, limit: int, after: TraceId | None) -> tuple[list[Trace], bool] | None:
        """Up to ``limit`` of a tenant's traces, and whether more follow; None if ``after`` is not known."""
        traces = self.of(salt)
        if after is not None and not any(trace.trace == after for trace in traces):
            return None
        found = list(islice(traces if after is not None else self.of(salt), limit + 1))
        return found[:limit], len(found) > limit

    def lefts(self, key: TraceKey) -> tuple[tuple[Left, ...], tuple[Left, ...]]:
        """The contexts that a step of a trace may continue: its parent's, and its own."""
        trace = self._traces.get(key)
        if trace is None:
            return (), ()
        parent = self._parent(trace)
        return parent.lefts if parent is not None else (), trace.lefts

    def place(
        self, salt: str, digests: Sequence[bytes], fresh: TraceId, *, first: bool = False, heard: Heard | None = None
    ) -> Place:
        """The trace of a call with these digests (see :func:`router.traces.prefixes.own`); ``fresh`` if it is a new
        one. ``heard.at``: its place among them."""
        longest = self._lookups.longest(digests)
        if first and digests and longest == digests[-1]:
            return Place(fresh, shared=True)
        if heard is not None and (longest is None or digests.index(longest) < heard.at):
            # Nobody has gone on from this answer yet.
            trace = self._lookups.response(salt, heard.name)
            if trace is not None:
                return Place(trace)
        key = self._lookups.owner(longest) if longest is not None else None
        if key is None or key[0] != salt:
            return Place(fresh)
        return Place(key[1]) if self._traces[key].tip == longest else Place(fresh, key[1])

    def texts(self, keys: Sequence[TraceKey]) -> list[Text]:
        """What was said in these traces, of each the newest first."""
        known = [trace for key in keys if (trace := self._traces.get(key)) is not None]
        return [text for trace in known for text in reversed(trace.texts)]

    def response(self, salt: str, response: str) -> TraceId | None:
        """The trace in which a tenant was given a response."""
        return self._lookups.response(salt, response)

    # --- what happens -----------------------------------------------------------------------------------------

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Let something happen; returns what is to be done. What comes late, of a trace that is not known any more or
        of a step that does not run, changes nothing."""
        effects: list[Effect] = []
        match event:
            case StepBegan():
                self._began(event, now_s, effects)
            case Recognised():
                self._recognised(event, now_s)
            case Tick():
                for alarm in self._alarms.due(now_s):
                    self._put(self._between.due(self._traces[alarm.key], alarm, effects))
            case _:
                trace = self._traces.get(event.key)
                if trace is None:
                    return effects
                after = self._after(trace, event, now_s, effects)
                if after is None:
                    self._forget(trace)
                elif after is not trace:
                    self._put(after)
        self._make_room()
        return effects

    def _after(self, trace: Trace, event: OfKnown, now_s: float, effects: list[Effect]) -> Trace | None:
        """A trace after an event; None: it is to be forgotten."""
        match event:
            case StepPlaced():
                return self._placed(trace, event, now_s, effects)
            case StepGrew(_, step, packed):
                return replace(trace, asks=asks.grown(trace.asks, step, packed, now_s))
            case StepMoved(_, decision):
                known = trace.runs(decision.step) is not None
                return noted(trace, decision, now_s, effects) if known else trace
            case StepEnded():
                return self._ended(trace, event, now_s, effects)
            case Answered():
                return self._answered(trace, event, now_s, effects)
            case ContextRecalled(_, step, warm, decision):
                trace = noted(trace, decision, now_s, effects)
                return replace(trace, lefts=warmed(trace.lefts, step, warm)) if warm is not None else trace
            case Charged(_, bill):
                return replace(trace, bill=trace.bill + bill)
            case CallOver():
                calls = max(0, trace.calls_open - 1)
                return replace(trace, calls_open=calls) if trace.steps_count or calls else None
            case Suspended():
                return self._between.suspended(trace, event, now_s, effects)
            case Resumed():
                return self._between.resumed(trace, now_s, effects)
            case PinAsked(_, ttl_s, wish):
                said = {"kind": wish.kind, "ttl_s": ttl_s, "priority": wish.priority, "replicas": wish.replicas}
                trace = noted(trace, Asked("pin", said), now_s, effects)
                return trace if ttl_s else replace(trace, pin=None)
            case PinHeld(_, wish):
                return replace(trace, pin=wish)
            case Elsewhere():
                return None if trace.forgettable else trace
            case Deleted():
                if trace.running:
                    effects.append(StopSteps(trace.key, tuple(step.step for step in trace.running)))
                effects.append(StopRecall(trace.key))
                self._between.release(trace, effects, [left.warm.node for left in trace.lefts if left.warm is not None])
                return None

    def restore(self, trace: Trace, alarms: Iterable[Alarm]) -> None:
        """Take in one that was written down, as the one used last: see :func:`router.traces.revival.revived`."""
        assert trace.key not in self._traces
        digests = tuple(digest for digest in trace.digests if self._lookups.owner(digest) is None)
        self._lookups.take(trace.key, (), digests)
        for name in trace.responses:
            self._lookups.gave(trace.key, trace.responses, name)
        for alarm in alarms:
            self._alarms.add(alarm)
        self._put(replace(trace, digests=digests, tip=trace.tip if trace.tip in digests else None))
        self._make_room()

    def planned(self, key: TraceKey) -> tuple[Alarm, ...]:
        """What is to happen to a trace."""
        return self._alarms.of(key)

    # --- calls and steps --------------------------------------------------------------------------------------

    def _recognised(self, event: Recognised, now_s: float) -> None:
        trace = self._traces.get(event.key) or Trace(event.key, now_s)
        tip = event.digests[-1] if event.digests else None
        loser = self._lookups.owner(tip) if tip is not None else None
        if loser is not None and loser != event.key:
            other = self._traces[loser]
            left = tuple(digest for digest in other.digests if digest != tip)
            self._put(replace(other, digests=left, tip=None if other.tip == tip else other.tip))
        tip = tip if not event.shared else None
        digests = self._lookups.take(event.key, trace.digests, event.digests)
        self._put(replace(trace, digests=digests, tip=tip or trace.tip, calls_open=trace.calls_open + 1))
        self._uses.used(event.key)

    def _began(self, event: StepBegan, now_s: float, effects: list[Effect]) -> None:
        trace = self._traces.get(event.key) or Trace(event.key, now_s)
        assert trace.runs(event.step) is None, f"step {event.step} runs already"
        if not trace.steps_count:
            trace = self._adopted(trace, event.parent, now_s)
        agent, tools, pause = event.agent or trace.agent, trace.tools, None
        if trace.idle_since_s is not None:
            pause = Pause(event.tools or trace.calls or (), now_s - trace.idle_since_s)
            tools = used(tools, pause) if pause.tools else tools
            self.gaps.saw(agent, pause.tools, pause.seconds)
        step = Step(event.step, trace.last_step or self._fork_point(trace), now_s, event.prompt_tokens, pause)
        self._alarms.clear(event.key)
        effects.append(StopRecall(event.key))
        self._put(
            replace(
                trace,
                agent=agent,
                tools=tools,
                running=(*trace.running, step),
                unanswered=(*trace.unanswered[1 - UNANSWERED_MAX :], event.step),
                steps_count=trace.steps_count + 1,
                last_step=event.step,
                keep_s=event.keep_s,
                idle_since_s=None,
                calls=None,
                suspension=None,
                decided=False,
                ended=False,
                asks=asks.asked(trace.asks, event.ask),
                tenant=event.tenant,
                limits=event.limits.after(trace.limits),
            )
        )
        self._uses.used(event.key)

    def _adopted(self, trace: Trace, parent: TraceId | None, now_s: float) -> Trace:
        """A trace at its first step, which starts at its parent's places."""
        trace = replace(trace, began_s=now_s, parent=parent if parent != trace.trace else None)
        origin = self._parent(trace)
        if origin is None:
            return trace
        if len(origin.children) < CHILDREN_MAX:
            self._put(replace(origin, children=(*origin.children, trace.trace)))
        self._uses.used(origin.key)
        return replace(trace, home=origin.home, agent=origin.agent)

    def _placed(self, trace: Trace, event: StepPlaced, now_s: float, effects: list[Effect]) -> Trace:
        decision = event.decision
        step = trace.runs(decision.step)
        if step is None:
            return trace
        parent = self._parent(trace)
        if event.takes and event.continues is not None and parent is not None:
            self._put(replace(parent, lefts=warmed(parent.lefts, event.continues, None)))
        continues = event.continues or step.parent
        placed = replace(step, parent=continues, decode=decision.decode, prefill=decision.prefill)
        running = tuple(placed if one is step else one for one in trace.running)
        trace = replace(trace, home=decision.home, worker=decision.decode, running=running)
        return noted(trace, decision, now_s, effects)

    def _ended(self, trace: Trace, event: StepEnded, now_s: float, effects: list[Effect]) -> Trace:
        step = trace.runs(event.step)
        if step is None:
            return trace
        output_tokens, hits, seconds = event.output_tokens, event.hits, now_s - step.began_s
        done = replace(step, ended_s=now_s, ending=event.ending, output_tokens=output_tokens, hits=hits)
        computed = max(0, step.prompt_tokens - hits.delivered) if hits is not None else 0
        trace = replace(
            trace,
            running=tuple(one for one in trace.running if one is not step),
            past=past_with(trace.past, done),
            asks=asks.ended(trace.asks, event.step, event.begun, now_s),
            ended=trace.ended or event.final,
            service=trace.service.more(computed, output_tokens, seconds),
        )
        if event.left is not None:
            trace = replace(trace, reload_token_s=event.reload_token_s)
            trace = with_kept(trace, grow(trace.lefts, event.left), trace.texts)
        ended = Ended(event.step, event.ending, step.prompt_tokens, output_tokens, seconds, hits)
        trace = noted(trace, ended, now_s, effects)
        if not trace.running:
            trace = replace(trace, idle_since_s=now_s)
            if trace.ended:
                return self._between.release(with_kept(trace, (), ()), effects)
        return self._between.settled(trace, now_s, effects)

    def _answered(self, trace: Trace, event: Answered, now_s: float, effects: list[Effect]) -> Trace:
        if event.step not in trace.unanswered:
            return trace
        left = asks.answered(trace.asks, event.step) if event.done else trace.asks
        trace = replace(trace, unanswered=tuple(step for step in trace.unanswered if step != event.step), asks=left)
        for name in (event.response, event.heard):
            if name is not None:
                trace = replace(trace, responses=self._lookups.gave(trace.key, trace.responses, name))
        if event.tools is not None:
            trace = replace(trace, calls=event.tools)
        if event.said is not None and trace.state != "ended":
            trace = with_kept(trace, trace.lefts, remember(trace.texts, event.said))
        return self._between.settled(trace, now_s, effects)

    # --- keeping ----------------------------------------------------------------------------------------------

    def _parent(self, trace: Trace) -> Trace | None:
        return self._traces.get((trace.key[0], trace.parent)) if trace.parent is not None else None

    def _fork_point(self, trace: Trace) -> StepId | None:
        parent = self._parent(trace)
        return parent.lefts[-1].step if parent is not None and parent.lefts else None

    def _put(self, trace: Trace) -> None:
        self._uses.put(trace)
        if self.changed is not None:
            self.changed[trace.key] = None

    def _forget(self, trace: Trace) -> None:
        """Nothing of it stays."""
        key = trace.key
        self._uses.drop(key)
        if self.changed is not None:
            self.changed[key] = None
        self._alarms.clear(key)
        self._lookups.drop(trace)
        parent = self._parent(trace)
        if parent is not None and trace.trace in parent.children:
            self._put(replace(parent, children=tuple(name for name in parent.children if name != trace.trace)))

    def _make_room(self) -> None:
        while self._uses.count > self._max or self._uses.nbytes > self._bytes_max:
            idle = self._uses.first()
            if idle is None:
                return  # what is under way is bounded by the API's own limit
            self._forget(self._traces[idle])

    def check(self) -> None:
        """Assert that the limits hold, and that nothing is kept of what was forgotten."""
        traces = self._traces.values()
        within = self._uses.count <= self._max and self._uses.nbytes <= self._bytes_max
        assert within or not any(trace.forgettable for trace in traces)
        self._uses.check()
        planned = self._alarms.traces()
        assert planned <= self._traces.keys()
        for trace in traces:
            assert with_kept(trace, trace.lefts, trace.texts) == trace
            assert trace.steps_count or (trace.calls_open and not trace.running)
            assert not trace.steps_count or (trace.idle_since_s is None) == bool(trace.running)
            assert trace.state != "ended" or not (trace.lefts or trace.texts)
            assert all(self._traces[trace.key[0], child].parent == trace.trace for child in trace.children)
            assert not trace.running or trace.key not in planned
        self._alarms.check()
        self._lookups.check(traces)
