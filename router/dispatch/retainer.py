"""Carries out what is decided for traces between their steps: pins at the stores, contexts that come back in time.

Everything here is a hint: what fails costs time, never an answer. Pins and prefetch jobs are the stores' own, so they
outlive the router.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from router.fleet.load import Warm
from router.fleet.members import MemberRegistry
from router.policy.gaps import Gap, Gaps, Tools, certain
from router.policy.retention import RECALLED_KEEP_S, Retention, RetentionConfig, Situation, decide
from router.traces.contexts import Left
from router.traces.decisions import Decisions, Recalled, Retained
from router.traces.registry import PinWish, Step, Suspension, Trace, TraceKey, Traces
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.runtime.tasks import Tasks
from tracehaul.wire.base import Ok
from tracehaul.wire.blocks import Pin, Pinned, Prefetch, PrefetchCancel, PrefetchPoll, PrefetchState, Unpin
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.errors import ClusterError, ProtocolError, Unavailable
from tracehaul.wire.hashing import salted
from tracehaul.wire.ids import NodeId, TraceId
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.steps import ForgetContext, KeepContext, RecallContext, Resident
from worker.rates import ASSUMED

seldom = Seldom(Log(__name__))

ACTS_MAX = 512
"""Calls to stores and workers under way; what would be more is left undone."""
CALL_TIMEOUT_S = 2.0
RECALL_TIMEOUT_S = 30.0
PREFETCH_POLL_S = 0.2

R = TypeVar("R", bound=Reply)


class RetentionStats(msgspec.Struct):
    """Counters of the router's life, for metrics."""

    pins: int = 0
    pins_refused: int = 0
    recalls: int = 0
    recalled_tokens: int = 0
    recalls_vain: int = 0
    recalls_cut: int = 0
    prefetches: int = 0
    prefetches_cut: int = 0
    undone: int = 0


class Retainer:
    """One router's."""

    def __init__(
        self, peers: Peers, members: MemberRegistry, traces: Traces, decisions: Decisions, config: RetentionConfig
    ) -> None:
        self.stats = RetentionStats()
        self._peers = peers
        self._members = members
        self._traces = traces
        self._decisions = decisions
        self._config = config
        self._gaps = Gaps()
        self._closed = False
        self._tasks = Tasks("retention")
        self._timers: dict[TraceKey, list[asyncio.TimerHandle]] = {}
        self._recalls: dict[TraceKey, asyncio.Task[None]] = {}
        self._prefetches: dict[TraceKey, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Do nothing more."""
        self._closed = True
        for key in list(self._timers):
            self._stop_timers(key)
        await self._tasks.close()

    # --- what happens to traces ---------------------------------------------------------------------------

    def began(self, trace: Trace, step: Step) -> None:
        """A step of it began: nothing is to be brought back any more."""
        self._stop_timers(trace.key)
        recall = self._recalls.get(trace.key)
        if recall is not None and recall.cancel():
            self.stats.recalls_cut += 1
        if step.gap is not None:
            self._gaps.saw(trace.agent, step.gap.tools, step.gap.seconds)

    def ended(self, trace: Trace) -> None:
        """A step of it ended."""
        if trace.running:
            return
        if trace.ended:
            self._release(trace, [])
        elif trace.lefts:
            self._retain(trace, self._gaps.expect(trace.agent, trace.calls), trace.calls)

    def called(self, trace: Trace, tools: tuple[str, ...]) -> None:
        """What its last step called turned out."""
        trace.calls = tools
        if trace.state == "acting":
            self.ended(trace)

    def suspend(self, trace: Trace, expected_s: float, deadline_s: float | None, tool: str | None) -> None:
        """The client says that it is idle for so long, and after ``deadline_s`` for ever."""
        now_s = clock.now_s()
        trace.suspension = Suspension(now_s, expected_s, deadline_s, tool)
        trace.calls = (tool,) if tool is not None else trace.calls
        told_s = deadline_s if deadline_s is not None else 2 * expected_s
        self._retain(trace, certain(expected_s), trace.calls, told_s=told_s)
        if deadline_s is not None:
            self._after(trace, deadline_s, lambda: self._expire(trace))

    def resume(self, trace: Trace) -> None:
        """The client says that its next step comes soon."""
        self._stop_timers(trace.key)
        trace.suspension = None
        self._start_recall(trace, "the client resumes it", told=True)

    def forget(self, trace: Trace) -> None:
        """It is no longer remembered."""
        self._stop_timers(trace.key)

    def delete(self, trace: Trace, lefts: list[Left]) -> None:
        """The client has deleted it, with what it had left: what only it held is freed."""
        recall = self._recalls.get(trace.key)
        if recall is not None:
            recall.cancel()
        self._release(trace, lefts)

    async def pin(self, trace: Trace, wish: PinWish) -> Pinned:
        """Pin its context, and those of its next steps, as its client wishes.

        Raises:
            Unavailable: there is no store, or nothing to pin.
            ClusterError: the store refuses, or does not answer.
        """
        pin = self._pin_of(trace, trace.trace, wish.until_s - clock.now_s(), wish.priority, wish)
        if pin is None:
            raise Unavailable("the trace has no context in a store")
        info, message = pin
        pinned = await self._ask(info, message, Pinned)
        trace.pin = wish
        return pinned

    async def unpin(self, trace: Trace) -> None:
        """End that pin."""
        trace.pin = None
        home = self._node("store", trace.home)
        if home is not None:
            await self._ask(home, Unpin(trace.trace, trace.key[0]), Ok)

    # --- deciding -----------------------------------------------------------------------------------------

    def _retain(self, trace: Trace, gap: Gap, tools: Tools, *, told_s: float | None = None) -> None:
        self._stop_timers(trace.key)
        self._stop_prefetch(trace.key)
        now = Situation(trace.context_tokens, trace.context_tokens * self._pull_token_s(trace))
        plan = trace.retention = decide(gap, now, self._config, told_s=told_s)
        median_s, longest_s = gap.quantile(0.5), gap.quantile(0.99)
        self._decisions.add(trace.key, clock.now_s(), Retained(tools, gap.seen, median_s, longest_s, now, plan))
        if plan.pin_s > 0 or trace.pin is not None:
            self._start(self._pin(trace, plan), f"pin {trace.trace}")
        if plan.recall_s is not None:
            told = told_s is not None
            self._after(trace, plan.recall_s, lambda: self._start_recall(trace, "its next step is expected", told=told))

    def _pull_token_s(self, trace: Trace) -> float:
        """Of the worker that has its context."""
        warm = trace.lefts[-1].warm if trace.lefts else None
        load = self._members.load(warm.node) if warm is not None else NodeLoad()
        return load.pull_token_s if load.token_s else ASSUMED.pull_token_s

    def _release(self, trace: Trace, lefts: list[Left]) -> None:
        self._stop_timers(trace.key)
        self._stop_prefetch(trace.key)
        trace.retention = None
        home = self._node("store", trace.home)
        if home is not None and (self._config.pins or trace.pin is not None):
            for name in (_automatic(trace), *((trace.trace,) if trace.pin is not None else ())):
                self._start(self._try(home, Unpin(name, trace.key[0]), Ok), f"unpin {name}")
        trace.pin = None
        workers = {left.warm.node: None for left in lefts if left.warm is not None}
        workers |= {step.decode: None for step in list(trace.steps)[-1:] if step.decode is not None}
        for node in workers:
            worker = self._node("decode", node)
            if worker is not None:
                self._start(self._try(worker, ForgetContext(trace.trace, trace.key[0]), Resident), "forget")

    def _expire(self, trace: Trace) -> None:
        """It was not back by its deadline."""
        if trace.state == "suspended":
            self._traces.expire(trace)
            self._release(trace, [])

    # --- acting -------------------------------------------------------------------------------------------

    async def _pin(self, trace: Trace, plan: Retention) -> None:
        wish, now_s = trace.pin, clock.now_s()
        pins = [self._pin_of(trace, _automatic(trace), plan.pin_s, plan.priority, None)] if plan.pin_s > 0 else []
        if wish is not None and wish.until_s > now_s:
            pins.append(self._pin_of(trace, trace.trace, wish.until_s - now_s, wish.priority, wish))
        for pin in pins:
            if pin is not None:
                self.stats.pins += 1
                self.stats.pins_refused += await self._try(*pin, Pinned) is None

    def _pin_of(
        self, trace: Trace, name: TraceId, ttl_s: float, priority: float, wish: PinWish | None
    ) -> tuple[NodeInfo, Pin] | None:
        home = self._node("store", trace.home)
        if home is None or not trace.lefts or not trace.lefts[-1].hashes:
            return None
        last = (trace.lefts[-1].hashes[-1],)  # a pin covers what comes before it, too
        kind, replicas = ("soft", 1) if wish is None else (wish.kind, wish.replicas)
        return home, Pin(name, last, ttl_s, kind, priority, tenant=trace.key[0], replicas=replicas)

    def _start_recall(self, trace: Trace, why: str, *, told: bool) -> None:
        if not self._config.recall or trace.running or not trace.lefts or trace.key in self._recalls:
            return
        task = self._start(self._recall(trace, trace.lefts[-1], why, told=told), f"recall {trace.trace}")
        if task is not None:
            self._recalls[trace.key] = task
            task.add_done_callback(lambda _: self._recalls.pop(trace.key, None))

    async def _recall(self, trace: Trace, left: Left, why: str, *, told: bool) -> None:
        """Bring a context back to the worker that had it, or to the one with the least to do."""
        worker = self._worker(trace, left)
        if worker is None:
            return
        here = await self._try(worker, KeepContext(trace.trace, trace.key[0], RECALLED_KEEP_S), Resident)
        if here is None or here.tokens >= left.tokens:
            return
        self.stats.recalls += 1
        began_s = clock.now_s()
        self._start_prefetch(trace, left)
        recall = RecallContext(trace.trace, worker.root, left.packed, trace.key[0], RECALLED_KEEP_S, told)
        now_there = await self._try(worker, recall, Resident, RECALL_TIMEOUT_S)
        tokens = now_there.tokens if now_there is not None else 0
        gained = max(0, tokens - here.tokens)
        self.stats.recalled_tokens += gained
        self.stats.recalls_vain += gained == 0
        if tokens:
            self._traces.rewarm(trace, left, replace(left, warm=Warm(worker.node, worker.generation, tokens)))
        now_s = clock.now_s()
        self._decisions.add(trace.key, now_s, Recalled(worker.node, why, gained, tokens, now_s - began_s))

    def _start_prefetch(self, trace: Trace, left: Left) -> None:
        home = self._node("store", trace.home)
        if home is None or not self._members.has_tiers(home.node) or not left.hashes:
            return
        self._stop_prefetch(trace.key)
        task = self._start(self._prefetch(trace.key, home, left), f"prefetch {trace.trace}")
        if task is not None:
            self._prefetches[trace.key] = task

    async def _prefetch(self, key: TraceKey, home: NodeInfo, left: Left) -> None:
        """Let the store bring it up from what is below its memory: ahead of the worker, or in its stead.

        A step that begins meanwhile reads what is brought. Where the store lacks room for a block, or the block, what
        follows is not brought either.
        """
        self.stats.prefetches += 1
        state = await self._try(home, Prefetch(tuple(left.hashes)), PrefetchState)
        try:
            while state is not None and state.state == "running" and not state.missed:
                await asyncio.sleep(PREFETCH_POLL_S)
                state = await self._try(home, PrefetchPoll(state.job), PrefetchState)
        finally:
            if state is not None and state.state == "running":
                self.stats.prefetches_cut += 1
                self._start(self._try(home, PrefetchCancel(state.job), PrefetchState), "cancel a prefetch")
            if self._prefetches.get(key) is asyncio.current_task():
                del self._prefetches[key]

    def _stop_prefetch(self, key: TraceKey) -> None:
        """Nobody waits for it."""
        task = self._prefetches.pop(key, None)
        if task is not None:
            task.cancel()

    def _worker(self, trace: Trace, left: Left) -> NodeInfo | None:
        workers = [w for w in self._members.live("decode") if salted(w.root, trace.key[0]) == left.root]
        warm = left.warm
        same = next((w for w in workers if warm and (w.node, w.generation) == (warm.node, warm.generation)), None)
        return same or min(workers, key=lambda worker: self._members.load(worker.node).running, default=None)

    def _node(self, role: str, node: NodeId | None) -> NodeInfo | None:
        return next((info for info in self._members.live(role) if info.node == node), None)

    async def _ask(self, info: NodeInfo, request: Request, reply_type: type[R], timeout_s: float = CALL_TIMEOUT_S) -> R:
        reply = await self._peers.call(info.address, request, timeout_s=timeout_s)
        if not isinstance(reply, reply_type):
            raise ProtocolError(f"{info.node} answered {type(request).__name__} with {type(reply).__name__}")
        return reply

    async def _try(
        self, info: NodeInfo, request: Request, reply_type: type[R], timeout_s: float = CALL_TIMEOUT_S
    ) -> R | None:
        try:
            return await self._ask(info, request, reply_type, timeout_s)
        except ClusterError as error:
            seldom.warning("a hint was not taken", about=info.node, hint=type(request).__name__, why=str(error))
            return None

    def _start(self, work: Coroutine[Any, Any, object], name: str) -> "asyncio.Task[Any] | None":
        if self._closed or len(self._tasks) >= ACTS_MAX:
            work.close()
            self.stats.undone += 1
            return None
        return self._tasks.start(work, name)

    def _after(self, trace: Trace, delay_s: float, act: Callable[[], None]) -> None:
        timer = asyncio.get_running_loop().call_later(delay_s, act)
        self._timers.setdefault(trace.key, []).append(timer)

    def _stop_timers(self, key: TraceKey) -> None:
        for timer in self._timers.pop(key, ()):
            timer.cancel()


def _automatic(trace: Trace) -> TraceId:
    """The name of the router's own pin: no client can name it, so it never replaces what a client asked for."""
    return TraceId(f"{trace.trace}~")
