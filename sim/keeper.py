"""Who keeps traces' blocks at the stores: pins them after a step, asks for them before the next, waits for writers.

Stands for router and operators, as a process of its own; what it is granted goes into the checkers' books.
"""

import random
from collections.abc import Callable, Sequence

from sim.storage import Below
from sim.store_checker import PinChecker
from tracehaul.engine.fake import FAKE_LAYOUT
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.runtime.tasks import Tasks
from tracehaul.wire.blocks import (
    Await,
    Pin,
    PinKind,
    Pinned,
    Prefetch,
    PrefetchCancel,
    PrefetchPoll,
    PrefetchState,
    Unpin,
)
from tracehaul.wire.errors import ClusterError, Overloaded
from tracehaul.wire.hashing import chain, checksum, pack_tokens
from tracehaul.wire.ids import BlockHash, TraceId
from tracehaul.wire.messages import Request

CALL_S = 2.0
AWAIT_SHARE = 0.3
TTLS_S = (0.5, 3.0, 10.0)
ADDRESS = "keeper:1"

Where = Callable[[], Sequence[tuple[str, str]]]
"""The stores as of now: process and address."""


class Keeper:
    """One for all traces of a run."""

    def __init__(self, seed: int, below: Below, peers: Peers, stores: Where, pins: PinChecker) -> None:
        self._rng = random.Random(f"keeper {seed}")  # noqa: S311 - reproducible is the point
        self._below = below
        self._peers = peers
        self._stores = stores
        self._pins = pins
        self._tasks = Tasks("keeper")

    def stepped(self, trace: TraceId, salt: str, tokens: Sequence[int], *, final: bool) -> None:
        """A step has ended with this context."""
        hashes = chain(FAKE_LAYOUT.root(salt), pack_tokens(tokens), FAKE_LAYOUT.block_tokens)
        if not hashes:
            return
        if self._below.replicas > 1:
            self._copies(trace, salt, hashes, final=final)
        for process, address in self._stores():
            if self._below.replicas == 1 and final:
                self._tasks.start(self._unpin(process, address, salt, trace), "unpin")
            elif self._below.replicas == 1 and self._rng.random() < self._below.pin_share:
                kind: PinKind = self._rng.choice(("hard", "soft"))
                pin = Pin(
                    trace, tuple(hashes[-self._rng.choice((1, 4)) :]), self._rng.choice(TTLS_S), kind, tenant=salt
                )
                self._tasks.start(self._pin(process, address, pin), "pin")
            if self._rng.random() < self._below.prefetch_share:
                self._tasks.start(self._prefetch(address, hashes, cancel=self._rng.random() < 0.2), "prefetch")
            if self._rng.random() < AWAIT_SHARE:
                self._tasks.start(self._await(address, hashes), "await")

    def _copies(self, trace: TraceId, salt: str, hashes: Sequence[BlockHash], *, final: bool) -> None:
        """Pins with copies are the fleet's: told to one node, as a router does, and one by one."""
        order = sorted(self._stores(), key=lambda store: checksum(f"{store[0].partition('#')[0]} {trace}".encode()))
        if final:
            self._pins.fleet_ended((salt, trace))
            self._tasks.start(self._call(order[0][1], Unpin(trace, salt)), "unpin")
        elif self._below.pin_share:
            pin = Pin(trace, tuple(hashes), TTLS_S[-1], "hard", tenant=salt, replicas=self._below.replicas)
            self._tasks.start(self._pin_fleet([address for _, address in order], pin), "pin")

    async def _pin_fleet(self, addresses: Sequence[str], pin: Pin) -> None:
        sent_s = clock.now_s()
        for address in addresses:
            pinned = await self._call(address, pin)
            if isinstance(pinned, Pinned):
                until_s = sent_s + min(pinned.remaining_s, pin.ttl_s)
                self._pins.fleet_pinned((pin.tenant, pin.trace), until_s - CALL_S, pin.hashes)
                return

    async def _pin(self, process: str, address: str, pin: Pin) -> None:
        key = (process, pin.tenant, pin.trace)
        sent_s = clock.now_s()
        number = self._pins.asking(key, pin.kind, sent_s + pin.ttl_s)
        try:
            pinned = await self._peers.call(address, pin, timeout_s=CALL_S)
        except Overloaded:
            return  # refused: nothing has changed
        except ClusterError:
            self._pins.ended(key)
            return
        assert isinstance(pinned, Pinned)
        if pin.kind == "hard":
            self._pins.granted(key, number, sent_s + min(pinned.remaining_s, pin.ttl_s), pin.hashes)

    async def _unpin(self, process: str, address: str, salt: str, trace: TraceId) -> None:
        self._pins.ended((process, salt, trace))
        await self._call(address, Unpin(trace, salt))

    async def _prefetch(self, address: str, hashes: Sequence[BlockHash], *, cancel: bool) -> None:
        state = await self._call(address, Prefetch(tuple(hashes)))
        if isinstance(state, PrefetchState):
            await self._call(address, PrefetchCancel(state.job) if cancel else PrefetchPoll(state.job))

    async def _await(self, address: str, hashes: Sequence[BlockHash]) -> None:
        await self._call(address, Await(tuple(hashes[-4:]), 1.0))

    async def _call(self, address: str, request: Request) -> object:
        try:
            return await self._peers.call(address, request, timeout_s=CALL_S)
        except ClusterError:
            return None
