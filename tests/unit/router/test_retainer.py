"""What the router has the stores do for a context that is to come back."""

import asyncio
from collections.abc import Callable

import pytest

from router.dispatch.retainer import PREFETCH_POLL_S, Retainer
from router.fleet.load import Warm
from router.policy.retention import RetentionConfig
from router.traces.contexts import Left
from router.traces.decisions import Decisions
from router.traces.registry import Trace, Traces
from sim import loop as virtual
from tracehaul.wire.base import Ok
from tracehaul.wire.blocks import Pin, Pinned, Prefetch, PrefetchCancel, PrefetchPoll, PrefetchState, Unpin
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.hashing import salted
from tracehaul.wire.ids import BlockHash, Generation, NodeId, StepId, TraceId
from tracehaul.wire.steps import KeepContext, RecallContext, Resident

G = Generation(1)
ROOT = BlockHash(bytes(16))
STORE = NodeInfo(NodeId("store-0"), G, "store", "s:1")
DECODE = NodeInfo(NodeId("decode-0"), G, "decode", "d:1", root=ROOT)


class Members:
    def live(self, role):
        return [STORE] if role == "store" else [DECODE] if role == "decode" else []

    def has_tiers(self, node):
        return True

    def load(self, node):
        return NodeLoad()


class Nodes:
    """Answers as a store whose job brings 64 blocks a poll, and a worker that recalls what it is asked for."""

    def __init__(self, missed: Callable[[int], int]) -> None:
        self.asked = []
        self.done = 0
        self.missed = missed

    async def call(self, address, request, timeout_s):
        self.asked.append(type(request).__name__)
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
                return Pinned(())
            case Unpin():
                return Ok()
            case _:
                return Resident(0)


def run(test, missed=lambda done: 0):
    async def main():
        nodes = Nodes(missed)
        traces = Traces(10, 1 << 20)
        retainer = Retainer(nodes, Members(), traces, Decisions(10), RetentionConfig(pins=False))
        trace, step = traces.start(("", TraceId("t")), None, StepId("s"), 0.0)
        left = Left(StepId("s"), salted(ROOT, ""), 32, bytes(4 * 64), (ROOT, ROOT), 64, Warm(DECODE.node, G, 64))
        traces.leave(trace, left)
        traces.end(trace, step, 1.0, final=False)
        trace.home = STORE.node
        try:
            await test(retainer, nodes, trace)
        finally:
            await retainer.close()
        return nodes.asked, retainer.stats

    return virtual.run(main, 0)


async def resumed(retainer: Retainer, nodes: Nodes, trace: Trace) -> None:
    retainer.resume(trace)
    await asyncio.sleep(20 * PREFETCH_POLL_S)


def test_a_prefetch_is_followed_to_its_end() -> None:
    asked, stats = run(resumed)
    assert [name for name in asked if name.startswith("Prefetch")] == ["Prefetch"] + 5 * ["PrefetchPoll"]
    assert (stats.prefetches, stats.prefetches_cut) == (1, 0)


def test_a_prefetch_for_which_there_is_no_room_is_called_off() -> None:
    asked, stats = run(resumed, missed=lambda done: max(0, done - 128))
    assert [name for name in asked if name.startswith("Prefetch")] == [
        "Prefetch",
        *3 * ["PrefetchPoll"],
        "PrefetchCancel",
    ]
    assert stats.prefetches_cut == 1


@pytest.mark.parametrize("what", ["delete", "suspend"])
def test_a_prefetch_that_nobody_waits_for_is_called_off(what: str) -> None:
    async def test(retainer: Retainer, nodes: Nodes, trace: Trace) -> None:
        retainer.resume(trace)
        await asyncio.sleep(1.5 * PREFETCH_POLL_S)
        if what == "delete":
            retainer.delete(trace, [])
        else:
            retainer.suspend(trace, 1000.0, None, None)
        await asyncio.sleep(20 * PREFETCH_POLL_S)

    asked, stats = run(test)
    assert [name for name in asked if name.startswith("Prefetch")] == ["Prefetch", "PrefetchPoll", "PrefetchCancel"]
    assert (stats.prefetches, stats.prefetches_cut) == (1, 1)
