"""What the router has stores and workers do for traces between their steps."""

import asyncio
from collections.abc import Callable

import msgspec
import pytest
import uvloop

from router.dispatch import retainer as retainer_module
from router.dispatch.retainer import PREFETCH_POLL_S, Retainer
from router.fleet.load import Warm
from router.policy.retention import RetentionConfig
from router.traces.book import Book
from router.traces.contexts import Left
from router.traces.decisions import Placed, Retained
from router.traces.effects import StopSteps
from router.traces.events import Answered, Deleted, Resumed, StepBegan, StepEnded, StepPlaced, Suspended
from router.traces.machine import Traces
from router.traces.texts import Said, fresh
from router.traces.trace import TraceKey
from sim import loop as virtual
from tracehaul.runtime import clock
from tracehaul.runtime.memory import give_back
from tracehaul.wire.base import Ok
from tracehaul.wire.blocks import Pin, Pinned, Prefetch, PrefetchCancel, PrefetchPoll, PrefetchState, Unpin
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.hashing import chain, pack_tokens, salted
from tracehaul.wire.ids import BlockHash, Generation, NodeId, StepId, TraceId
from tracehaul.wire.steps import ForgetContext, KeepContext, RecallContext, Resident

G = Generation(1)
ROOT = BlockHash(bytes(16))
STORE = NodeInfo(NodeId("store-0"), G, "store", "s:1")
DECODE = NodeInfo(NodeId("decode-0"), G, "decode", "d:1", root=ROOT, features=("recall",))
STOCK = msgspec.structs.replace(DECODE, features=(), lacks=("seeds",))
KEY: TraceKey = ("", TraceId("t"))
BLOCK = 32


class Members:
    def live(self, role):
        return [STORE] if role == "store" else [DECODE] if role == "decode" else []

    def known(self, node):
        return {STORE.node: STORE, DECODE.node: DECODE}.get(node)

    def has_tiers(self, node):
        return True

    def load(self, node):
        return NodeLoad()


class Nodes:
    """Answers as a store whose job brings 64 blocks a poll, and a worker that recalls what it is asked for."""

    def __init__(self, missed: Callable[[int], int] = lambda done: 0) -> None:
        self.requests = []
        self.done = 0
        self.missed = missed

    @property
    def asked(self) -> list[str]:
        return [type(request).__name__ for request in self.requests]

    @property
    def pins(self) -> list[Pin]:
        return [request for request in self.requests if isinstance(request, Pin)]

    async def call(self, address, request, timeout_s):
        self.requests.append(request)
        match request:
            case Prefetch():
                return PrefetchState(7, "running", 320)
            case PrefetchPoll(job):
                assert job == 7
                self.done += 64
                return PrefetchState(
                    7, "done" if self.done == 320 else "running", 320, self.done, self.missed(self.done)
                )
            case PrefetchCancel(job):
                return PrefetchState(job, "cancelled", 320, self.done)
            case KeepContext():
                return Resident(0)
            case RecallContext():
                await asyncio.sleep(0.1)
                return Resident(0)
            case Pin():
                return Pinned(1, 1, 60.0)
            case Unpin():
                return Ok()
            case _:
                return Resident(0)


class Router:
    """As much of one as traces see."""

    def __init__(self, nodes: Nodes, config: RetentionConfig) -> None:
        self.nodes = nodes
        self.traces = Traces(10, 1 << 20, config)
        self.stopped: list[StopSteps] = []
        self.retainer = Retainer(nodes, Members(), self.traces, self.stopped.append)
        self.steps = 0

    @property
    def trace(self):
        return self.traces.get(KEY)

    def begin(self) -> StepId:
        self.steps += 1
        step = StepId(f"s{self.steps}")
        self.retainer.send(StepBegan(KEY, step, None, 64))
        placed = Placed(step, DECODE.node, "", 64, 0, None, 0, 0, None, STORE.node, {})
        self.retainer.send(StepPlaced(KEY, placed, None, False))
        return step

    def end(self, step: StepId, *, final: bool = False) -> None:
        packed = pack_tokens(range(BLOCK * (1 + self.steps)))
        root = salted(ROOT, "")
        left = Left(
            step, root, BLOCK, packed, b"".join(chain(root, packed, BLOCK)), 64, Warm(DECODE.node, G, len(packed) // 4)
        )
        self.retainer.send(StepEnded(KEY, step, "stop", 3, None, left, 1e-5, final))

    def step(self, tools: tuple[str, ...] | None = None) -> None:
        step = self.begin()
        self.end(step)
        self.retainer.send(Answered(KEY, step, tools=tools))


NO_PINS = RetentionConfig(pins=False)


def run(test, nodes=None, config=NO_PINS):
    async def main():
        router = Router(nodes or Nodes(), config)
        try:
            await test(router)
        finally:
            await router.retainer.close()
        router.traces.check()
        return router

    return virtual.run(main, 0)


async def resumed(router: Router) -> None:
    router.step()
    router.retainer.send(Resumed(KEY))
    await asyncio.sleep(20 * PREFETCH_POLL_S)


def prefetching(nodes: Nodes) -> list[str]:
    return [name for name in nodes.asked if name.startswith("Prefetch")]


def test_a_prefetch_is_followed_to_its_end() -> None:
    router = run(resumed)
    assert prefetching(router.nodes) == ["Prefetch"] + 5 * ["PrefetchPoll"]
    assert (router.retainer.stats.prefetches, router.retainer.stats.prefetches_cut) == (1, 0)


def test_a_prefetch_for_which_there_is_no_room_is_called_off() -> None:
    router = run(resumed, Nodes(missed=lambda done: max(0, done - 128)))
    assert prefetching(router.nodes) == ["Prefetch", *3 * ["PrefetchPoll"], "PrefetchCancel"]
    assert router.retainer.stats.prefetches_cut == 1


@pytest.mark.parametrize("event", [Deleted(KEY), Suspended(KEY, 1000.0, None, None)])
def test_a_prefetch_that_nobody_waits_for_is_called_off(event) -> None:
    async def test(router: Router) -> None:
        router.step()
        router.retainer.send(Resumed(KEY))
        await asyncio.sleep(1.5 * PREFETCH_POLL_S)
        router.retainer.send(event)
        await asyncio.sleep(20 * PREFETCH_POLL_S)

    router = run(test)
    assert prefetching(router.nodes) == ["Prefetch", "PrefetchPoll", "PrefetchCancel"]
    assert (router.retainer.stats.prefetches, router.retainer.stats.prefetches_cut) == (1, 1)


def test_each_step_is_decided_on_and_pinned_for_once() -> None:
    """With its tools, which are known after it ended."""
    count = 12

    async def test(router: Router) -> None:
        decided: list[Retained] = []
        router.retainer.told = lambda trace, entry: (
            decided.append(entry.decision) if isinstance(entry.decision, Retained) else None
        )
        for at in range(count):
            step = router.begin()
            await asyncio.sleep(0.01)
            for late in (False, True):  # the call layer is done before the step has ended, or after
                if late == bool(at % 2):
                    router.end(step)
                else:
                    router.retainer.send(Answered(KEY, step, tools=(f"tool-{at}",)))
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)
        assert [retained.tools for retained in decided] == [(f"tool-{at}",) for at in range(count)]
        assert len([e for e in router.trace.decisions if isinstance(e.decision, Retained)]) == count

    router = run(test, config=RetentionConfig(recall=False))
    assert router.nodes.asked == count * ["Pin"]
    assert {pin.trace for pin in router.nodes.pins} == {"t~"}
    assert len({pin.hashes for pin in router.nodes.pins}) == count, "each of what its own step left"


def test_steps_side_by_side_are_decided_on_when_the_last_is_over() -> None:
    async def test(router: Router) -> None:
        one, two = router.begin(), router.begin()
        router.end(one)
        router.retainer.send(Answered(KEY, one, tools=("bash",)))
        await asyncio.sleep(0.1)
        assert router.nodes.asked == []
        router.retainer.send(Answered(KEY, two, tools=None))
        router.end(two)
        await asyncio.sleep(0.1)

    router = run(test, config=RetentionConfig(recall=False))
    assert router.nodes.asked == ["Pin"]
    assert router.trace.decisions[-1].decision.tools == ("bash",)


def test_the_clients_pin_follows_its_contexts_and_is_not_repeated_where_it_is() -> None:
    async def test(router: Router) -> None:
        book = Book(router.traces, router.retainer)
        router.step()
        await asyncio.sleep(0.1)
        assert await book.pin(*KEY, "soft", 1000.0, 64.0, 2) == Pinned(1, 1, 60.0)
        router.step()
        await asyncio.sleep(0.1)
        step = router.begin()
        router.retainer.send(StepEnded(KEY, step, "unavailable", 0, None, None, 0.0, False))
        router.retainer.send(Answered(KEY, step))
        await asyncio.sleep(0.1)
        await book.pin(*KEY, "soft", 0.0, 64.0, 2)
        router.step()
        await asyncio.sleep(0.1)

    router = run(test, config=RetentionConfig(recall=False))
    assert [pin.trace for pin in router.nodes.pins] == ["t~", "t", "t~", "t", "t~", "t~"]
    first, moved = (pin for pin in router.nodes.pins if pin.trace == "t")
    assert (first.replicas, moved.replicas, moved.ttl_s) == (2, 2, pytest.approx(999.9, abs=0.2))
    assert first.hashes != moved.hashes


def test_a_worker_that_cannot_recall_is_not_asked_to_but_the_store_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Members, "live", lambda _, role: [STORE] if role == "store" else [STOCK])

    async def test(router: Router) -> None:
        router.step()
        router.retainer.send(Suspended(KEY, 100.0, 200.0, "make"))
        await asyncio.sleep(101.0)
        assert "Prefetch" in router.nodes.asked
        assert not {"RecallContext", "KeepContext"} & set(router.nodes.asked)

    run(test)


def test_one_timer_brings_back_what_is_due() -> None:
    async def test(router: Router) -> None:
        router.step()
        router.retainer.send(Suspended(KEY, 100.0, 200.0, "make"))
        assert router.traces.next_alarm_s == pytest.approx(clock.now_s() + 99.8, abs=0.1)
        await asyncio.sleep(99.0)
        assert "RecallContext" not in router.nodes.asked
        await asyncio.sleep(1.0)
        assert "RecallContext" in router.nodes.asked
        await asyncio.sleep(101.0)
        assert router.trace.state == "ended"
        assert router.traces.next_alarm_s is None

    router = run(test)
    assert router.nodes.asked[-1] == "ForgetContext"


def test_what_is_due_at_once_is_planned_on_the_loop_that_is_served_on() -> None:
    """A timer of uvloop's for a time that has come is none that knows its time."""

    async def test() -> None:
        router = Router(Nodes(), NO_PINS)
        router.step()
        router.retainer.send(Suspended(KEY, 0.0, 1e-6, None))
        router.retainer.send(Answered(KEY, StepId("late"), tools=()))
        await asyncio.sleep(0.01)
        assert router.trace.state == "ended"
        await router.retainer.close()

    uvloop.run(test())


def test_a_deleted_trace_is_told_to_everybody_who_has_something_of_it() -> None:
    async def test(router: Router) -> None:
        router.step()
        step = router.begin()
        router.retainer.send(Deleted(KEY))
        await asyncio.sleep(0.1)
        assert router.stopped == [StopSteps(KEY, (step,))]
        assert router.trace is None
        router.end(step)
        router.retainer.send(Answered(KEY, step, tools=()))
        assert len(router.traces) == 0

    router = run(test, config=RetentionConfig(recall=False))
    assert router.nodes.asked == ["Pin", "Unpin", "ForgetContext"]
    assert isinstance(router.nodes.requests[-1], ForgetContext)


def test_memory_is_given_back_once_much_of_it_is_free(monkeypatch) -> None:
    given = []
    monkeypatch.setattr(retainer_module, "GIVE_BACK_BYTES", 10_000)

    async def give(call):
        given.append(call)

    monkeypatch.setattr(retainer_module.asyncio, "to_thread", give)

    async def test(router: Router) -> None:
        for text in ("x" * 5_000, "x" * 20_000):
            step = router.begin()
            router.end(step)
            router.retainer.send(Answered(KEY, step, said=Said(fresh(text, [1]))))
            router.retainer.send(Deleted(KEY))
            await asyncio.sleep(2 * retainer_module.GIVE_BACK_S)

    run(test)
    assert given == [give_back]
    give_back()  # the real one, as far as a test can tell: it is there and comes back
