"""The shell of the traces: tells them what happens, and carries out what they want: pins at the stores, contexts that
come back in time, steps that end.

Everything here is a hint: what fails costs time, never an answer. Pins and prefetch jobs are the stores' own, so they
outlive the router.
"""

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import msgspec

from router.fleet.load import Warm
from router.fleet.members import MemberRegistry
from router.policy.retention import RECALLED_KEEP_S
from router.traces.contexts import Left, listed
from router.traces.decisions import Entry, Recalled
from router.traces.effects import (
    BringBack,
    Effect,
    EndPin,
    FreeContext,
    SetPin,
    StopPrefetch,
    StopRecall,
    StopSteps,
    Told,
)
from router.traces.events import ContextRecalled, Event, PinHeld, StepBegan, StepEnded, Tick
from router.traces.machine import Traces
from router.traces.trace import PinWish, Trace, TraceKey
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.runtime.memory import give_back
from tracehaul.runtime.tasks import Tasks
from tracehaul.wire.base import Ok
from tracehaul.wire.blocks import Pin, Pinned, Prefetch, PrefetchCancel, PrefetchPoll, PrefetchState, Unpin
from tracehaul.wire.cluster import ASSUMED, NodeInfo, NodeLoad
from tracehaul.wire.errors import ClusterError, ProtocolError, Unavailable
from tracehaul.wire.hashing import salted
from tracehaul.wire.ids import NodeId
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.steps import ForgetContext, KeepContext, RecallContext, Resident

seldom = Seldom(Log(__name__))

ACTS_MAX = 512
"""Calls to stores and workers under way; what would be more is left undone."""
CALL_TIMEOUT_S = 2.0
RECALL_TIMEOUT_S = 30.0
PREFETCH_POLL_S = 0.2
GIVE_BACK_BYTES = 8 * 2**20
"""Of traces that are gone: worth the work of giving the memory back to the system, a little later."""
GIVE_BACK_S = 0.5
FEW_RUN = 64
"""Up to so many steps all objects are looked at in some ten milliseconds."""

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
    """One router's: it alone tells ``traces`` what happens, and does what follows. ``stop`` ends steps that run."""

    def __init__(
        self, peers: Peers, members: MemberRegistry, traces: Traces, stop: Callable[[StopSteps], None]
    ) -> None:
        self.stats = RetentionStats()
        self.told: Callable[[TraceKey, Entry], None] = lambda key, entry: None
        """Told of each decision as it is made."""
        self.changed: Callable[[], None] = lambda: None
        """Told that something has happened to a trace."""
        self._peers = peers
        self._members = members
        self._traces = traces
        self._stop = stop
        self._closed = False
        self._tasks = Tasks("retention")
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0
        """When it ends."""
        self._most_bytes = 0
        """Of the traces, since memory was given back."""
        self._giving: asyncio.TimerHandle | None = None
        self._running = 0
        """Steps."""
        self._recalls: dict[TraceKey, asyncio.Task[None]] = {}
        self._prefetches: dict[TraceKey, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Do nothing more."""
        self._closed = True
        for timer in (self._timer, self._giving):
            if timer is not None:
                timer.cancel()
        await self._tasks.close()

    def now_s(self) -> float:
        """The time by which traces are told."""
        return clock.now_s()

    def send(self, event: Event) -> None:
        """Let something happen to a trace."""
        # A step of before the router's life ends in it without having begun.
        self._running = max(0, self._running + isinstance(event, StepBegan) - isinstance(event, StepEnded))
        for effect in self._traces.handle(event, clock.now_s()):
            self._do(effect)
        self.changed()
        self._plan()
        self._most_bytes = max(self._most_bytes, self._traces.nbytes)
        if self._most_bytes - self._traces.nbytes > GIVE_BACK_BYTES and self._giving is None and not self._closed:
            self._giving = asyncio.get_running_loop().call_later(GIVE_BACK_S, self._give_back)

    async def pin(self, trace: Trace, wish: PinWish) -> Pinned:
        """Pin its context, and those of its next steps, as its client wishes.

        Raises:
            Unavailable: there is no store, or nothing to pin.
            ClusterError: the store refuses, or does not answer.
        """
        home = self._node("store", trace.home)
        last = trace.lefts[-1].last if trace.lefts else None
        if home is None or last is None:
            raise Unavailable("the trace has no context in a store")
        ttl_s = wish.until_s - clock.now_s()
        pinned = await self._ask(
            home,
            Pin(trace.trace, (last,), ttl_s, wish.kind, wish.priority, tenant=trace.key[0], replicas=wish.replicas),
            Pinned,
        )
        self.send(PinHeld(trace.key, msgspec.structs.replace(wish, home=home.node, last=last)))
        return pinned

    async def unpin(self, trace: Trace) -> None:
        """End that pin."""
        home = self._node("store", trace.home)
        if home is not None:
            await self._ask(home, Unpin(trace.trace, trace.key[0]), Ok)

    def reload_token_s(self, warm: Warm | None) -> float:
        """What bringing back a token is expected to take the worker that has the context."""
        load = self._members.load(warm.node) if warm is not None else NodeLoad()
        return load.pull_token_s if load.token_s else ASSUMED.pull_token_s

    # --- acting -------------------------------------------------------------------------------------------

    def _do(self, effect: Effect) -> None:
        match effect:
            case Told(key, entry):
                self.told(key, entry)
            case SetPin():
                self._start(self._set_pin(effect), f"pin {effect.name}")
            case EndPin(key, name, home):
                self._hint("store", home, Unpin(name, key[0]), Ok)
            case BringBack():
                self._bring_back(effect)
            case StopRecall(key):
                recall = self._recalls.get(key)
                if recall is not None and recall.cancel():
                    self.stats.recalls_cut += 1
            case StopPrefetch(key):
                prefetch = self._prefetches.pop(key, None)
                if prefetch is not None:
                    prefetch.cancel()
            case FreeContext(key, worker):
                self._hint(None, worker, ForgetContext(key[1], key[0]), Resident)
            case StopSteps():
                self._stop(effect)

    def _plan(self) -> None:
        """One timer, for the first alarm; where that was taken back, for when it would have been."""
        at_s = self._traces.next_alarm_s
        if at_s is None or self._closed:
            return
        if self._timer is not None:
            if self._timer_s <= at_s:
                return
            self._timer.cancel()
        self._timer_s = at_s  # what uvloop makes for a time that has come does not know it
        self._timer = asyncio.get_running_loop().call_at(at_s, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.send(Tick())

    def _give_back(self) -> None:
        """And once more when what goes now has gone."""
        gone = self._most_bytes - self._traces.nbytes
        again = gone > GIVE_BACK_BYTES // 16 and not self._closed
        self._giving = asyncio.get_running_loop().call_later(GIVE_BACK_S, self._give_back) if again else None
        self._most_bytes = self._traces.nbytes
        if self._running < FEW_RUN:
            gc.collect()  # takes with it what the interpreter keeps for objects to come
        self._start(asyncio.to_thread(give_back), "give memory back")

    async def _set_pin(self, pin: SetPin) -> None:
        home = self._node("store", pin.home)
        if home is not None:
            last = (pin.last,)  # a pin covers what comes before it, too
            message = Pin(pin.name, last, pin.ttl_s, pin.kind, pin.priority, tenant=pin.key[0], replicas=pin.replicas)
            self.stats.pins += 1
            self.stats.pins_refused += await self._try(home, message, Pinned) is None

    def _bring_back(self, effect: BringBack) -> None:
        if effect.key in self._recalls:
            return
        task = self._start(self._recall(effect), f"recall {effect.key[1]}")
        if task is not None:
            self._recalls[effect.key] = task
            task.add_done_callback(lambda _: self._recalls.pop(effect.key, None))

    async def _recall(self, asked: BringBack) -> None:
        """Bring a context back to the worker that had it, or to the one with the least to do."""
        (salt, trace), left = asked.key, asked.left
        worker = self._worker(salt, left)
        if worker is None:
            return
        if "recall" not in worker.features:
            self._start_prefetch(asked)  # into the store's memory at least
            return
        here = await self._try(worker, KeepContext(trace, salt, RECALLED_KEEP_S), Resident)
        if here is None or here.tokens >= left.tokens:
            return
        self.stats.recalls += 1
        began_s = clock.now_s()
        self._start_prefetch(asked)
        recall = RecallContext(trace, worker.root, left.packed, salt, RECALLED_KEEP_S, asked.told)
        now_there = await self._try(worker, recall, Resident, RECALL_TIMEOUT_S)
        tokens = now_there.tokens if now_there is not None else 0
        gained = max(0, tokens - here.tokens)
        self.stats.recalled_tokens += gained
        self.stats.recalls_vain += gained == 0
        warm = Warm(worker.node, worker.generation, tokens) if tokens else None
        recalled = Recalled(worker.node, asked.why, gained, tokens, clock.now_s() - began_s)
        self.send(ContextRecalled(asked.key, left.step, warm, recalled))

    def _start_prefetch(self, asked: BringBack) -> None:
        home = self._node("store", asked.home)
        if home is None or not self._members.has_tiers(home.node) or not asked.left.hashes:
            return
        self._do(StopPrefetch(asked.key))
        task = self._start(self._prefetch(asked.key, home, asked.left), f"prefetch {asked.key[1]}")
        if task is not None:
            self._prefetches[asked.key] = task

    async def _prefetch(self, key: TraceKey, home: NodeInfo, left: Left) -> None:
        """Let the store bring it up from what is below its memory: ahead of the worker, or in its stead.

        A step that begins meanwhile reads what is brought. Where the store lacks room for a block, or the block, what
        follows is not brought either.
        """
        self.stats.prefetches += 1
        state = await self._try(home, Prefetch(tuple(listed(left.hashes))), PrefetchState)
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

    def _worker(self, salt: str, left: Left) -> NodeInfo | None:
        workers = [w for w in self._members.live("decode") if salted(w.root, salt) == left.root]
        warm = left.warm
        same = next((w for w in workers if warm and (w.node, w.generation) == (warm.node, warm.generation)), None)
        return same or min(workers, key=lambda worker: self._members.load(worker.node).running, default=None)

    def _node(self, role: str | None, node: NodeId | None) -> NodeInfo | None:
        """None for the role: whatever it is, also while it changes."""
        if role is None:
            return None if node is None else self._members.known(node)
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

    def _hint(self, role: str | None, node: NodeId, request: Request, reply_type: type[Reply]) -> None:
        info = self._node(role, node)
        if info is not None:
            self._start(self._try(info, request, reply_type), f"{type(request).__name__} at {node}")

    def _start(self, work: Coroutine[Any, Any, object], name: str) -> "asyncio.Task[Any] | None":
        if self._closed or len(self._tasks) >= ACTS_MAX:
            work.close()
            self.stats.undone += 1
            return None
        return self._tasks.start(work, name)
