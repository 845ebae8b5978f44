"""Steps that wait in the router: one goes at a time, and whoever leaves, is late or deleted holds nobody up."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from router.dispatch.line import LOOK_S, Line, Needs
from router.dispatch.pooled import Books
from router.dispatch.run import Run
from router.dispatch.stats import DispatchStats
from router.dispatch.steps import StepRequest
from router.fleet.load import Key
from router.policy.turns import STALLED_S
from sim import loop as virtual
from tracehaul.runtime import clock
from tracehaul.wire.cluster import NodeInfo, NodeLoad, WorkerLimits
from tracehaul.wire.errors import DeadlineExceeded, TraceDeleted, Unavailable
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import Generation, NodeId, StepId, TraceId
from tracehaul.wire.steps import Sampling

WORKER = Key(NodeId("d"), Generation(1))


class Fleet:
    """A worker of 1,000 tokens; what each step is expected to take is told here."""

    def __init__(self) -> None:
        self.books = Books()
        info = NodeInfo(*WORKER, "decode", "h:1", limits=WorkerLimits(kv_tokens_max=1000))
        self.books.decodes.sync([info], [NodeLoad()])
        self.takes_s: dict[str, float] = {}
        self.nowhere = False

    def front(self, pool: str) -> Books:
        return self.books

    def needs(self, run: Run) -> Needs:
        if self.nowhere:
            raise Unavailable("no decode worker is ready")
        return Needs(0.0, self.takes_s.get(run.request.trace, 0.0), 0.0, begins=False)

    def holds(self, tokens: int) -> None:
        self.books.decodes.sent(WORKER, 0.0, clock.now_s(), tokens)

    def ends(self, tokens: int) -> None:
        self.books.decodes.ended(WORKER, 0.0, computed=False, tokens=tokens)


def step(trace: str, tokens: int = 500, **more: Any) -> Run:
    made = StepRequest(
        StepId(f"{trace}/1"), TraceId(trace), None, pack_tokens([1] * tokens), Sampling(max_tokens=1), **more
    )
    return Run(made, (), ())


class Watched:
    """A line, and who went in which order; who goes takes memory for as long as the test wants."""

    def __init__(self) -> None:
        self.fleet, self.stats = Fleet(), DispatchStats()
        self.line = Line(self.fleet.front, self.fleet.needs, self.stats)
        self.went: list[str] = []

    async def go(self, run: Run) -> None:
        await self.line.turn(run)
        self.went.append(run.request.trace)
        self.fleet.holds(run.request.prompt_tokens)

    def ends(self, tokens: int = 500) -> None:
        self.fleet.ends(tokens)
        self.line.moved("")


def watching(test: Callable[[Watched], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        watched = Watched()
        await test(watched)
        assert len(watched.line) == 0
        watched.line.close()

    virtual.run(main)


def test_steps_go_at_once_while_there_is_room_and_then_one_by_one_in_order() -> None:
    async def test(at: Watched) -> None:
        await at.go(step("first"))
        at.fleet.takes_s = {"long": 9.0}
        waiting = [asyncio.create_task(at.go(step(name))) for name in ("long", "b", "c")]
        await asyncio.sleep(LOOK_S)
        assert at.went == ["first"]
        assert len(at.line) == 3
        for _ in waiting:
            at.ends()
            await asyncio.sleep(0.01)
        assert at.went == ["first", "b", "c", "long"]
        assert at.stats.steps_waited == 3
        assert at.stats.waited_s == pytest.approx(3 * LOOK_S, abs=0.1)
        await asyncio.gather(*waiting)

    watching(test)


def test_room_that_is_made_for_several_lets_several_go() -> None:
    async def test(at: Watched) -> None:
        at.fleet.holds(900)
        waiting = [asyncio.create_task(at.go(step(name, 200))) for name in "abc"]
        await asyncio.sleep(0.1)
        at.ends(900)
        await asyncio.gather(*waiting)
        assert at.went == list("abc")

    watching(test)


def test_whoever_leaves_is_late_or_deleted_holds_nobody_up() -> None:
    async def test(at: Watched) -> None:
        at.fleet.holds(900)
        late, deleted = step("late", deadline_s=clock.now_s() + 2.0), step("deleted")
        tasks = {name: asyncio.create_task(at.go(run)) for name, run in (("late", late), ("deleted", deleted))}
        tasks |= {name: asyncio.create_task(at.go(step(name))) for name in ("left", "told", "last")}
        await asyncio.sleep(0.1)
        deleted.stop()
        tasks["left"].cancel()
        await asyncio.sleep(3.0)
        with pytest.raises(DeadlineExceeded):
            await tasks["late"]
        with pytest.raises(TraceDeleted):
            await tasks["deleted"]
        at.ends(900)
        tasks["told"].cancel()  # it was told to go, and does not
        await asyncio.sleep(0.01)
        assert at.went == ["last"]

    watching(test)


def test_a_worker_that_says_nothing_of_its_end_holds_up_for_a_while_only() -> None:
    async def test(at: Watched) -> None:
        at.fleet.holds(900)
        began_s = clock.now_s()
        await at.go(step("a"))
        assert STALLED_S <= clock.now_s() - began_s <= STALLED_S + 2 * LOOK_S

    watching(test)


def test_what_is_in_the_background_named_its_worker_or_goes_nowhere_does_not_wait() -> None:
    async def test(at: Watched) -> None:
        at.fleet.holds(900)
        await at.go(step("night", step_class="background"))
        await at.go(step("named", decode=NodeId("d")))
        at.fleet.nowhere = True
        await at.go(step("nowhere"))
        assert at.stats.steps_waited == 0

    watching(test)
