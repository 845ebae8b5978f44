"""Whose a worker's time is, however often and by whomever it is told."""

import asyncio
from typing import Any, cast

import msgspec
import pytest

from records.fakes import MemoryDocuments
from router.calls.allowed import allowed
from router.calls.errors import CallFailed
from router.dispatch.bill_keeper import LATE_S as PAGE_LATE_S
from router.dispatch.bill_keeper import SHELF, BillKeeper
from router.dispatch.bills import HOLD_S, LATE_S, Bills, TraceLate
from router.dispatch.holdings import Holdings
from router.fleet.index import Index
from router.fleet.load import Key
from router.policy.bill_pages import Page, Report, report
from router.policy.prices import FREE, UNLIMITED, Bill, Limits, Prices, Tariff
from router.policy.retention import RetentionConfig
from router.traces.contexts import Left, joined
from router.traces.events import Deleted, Event, StepBegan, StepEnded
from router.traces.machine import Traces
from router.traces.trace import Trace, with_kept
from sim.loop import run
from tracehaul.runtime import clock
from tracehaul.wire.blocks import Snapshot
from tracehaul.wire.cluster import NodeInfo, NodeLoad, WorkerLimits
from tracehaul.wire.errors import BudgetExceeded
from tracehaul.wire.ids import BlockHash, Generation, NodeId, StepId, TraceId
from tracehaul.wire.spent import Allowance, Charge, Reading, Spent

KEY = ("salt", TraceId("t"))
DECODE, PREFILL = NodeId("decode-0"), NodeId("prefill-0")
PRICES = Prices(Tariff("USD", 7200.0, resident_gib_hour=3600 * 2.0**30), {PREFILL: 3600.0})
"""Two a second on decode workers, one on the prefill worker, and one for a byte that lies there for a second."""


class World:
    """Traces, and a router's bills of them."""

    def __init__(self, prices: Prices = PRICES) -> None:
        self.traces = Traces(100, 1 << 20, RetentionConfig())
        self.bills = Bills(self.traces, self.send, prices)
        self.now_s = 100.0
        self.life = Key(DECODE, Generation(1))

    def send(self, event: Event) -> None:
        self.traces.handle(event, self.now_s)

    def begin(self, step: str, limits: Limits = UNLIMITED, choices: int = 1) -> float | None:
        one = self.bills.entered(KEY, "acme", limits, choices, self.now_s)
        self.bills.began(StepId(step), one, self.now_s)
        self.send(StepBegan(KEY, StepId(step), None, 1, tenant="acme", limits=limits))
        return one.ends_s

    def end(self, step: str) -> None:
        self.send(StepEnded(KEY, StepId(step), "stop", 1, None, None, 0.0, final=False))
        self.bills.ended(StepId(step), self.now_s)

    def beat(
        self, *charges: tuple[str, int, Spent], node: NodeId = DECODE, new: bool = False, up_s: float = 0.0
    ) -> None:
        info = NodeInfo(node, Generation(1), "prefill" if node == PREFILL else "decode", "")
        said = tuple(Charge(*KEY, StepId(step), Reading(number, spent)) for step, number, spent in charges)
        self.bills.heard(info, NodeLoad(up_s=up_s, charges=said), self.now_s, new=new)

    @property
    def bill(self) -> Bill:
        """What the trace knows."""
        trace = self.traces.get(KEY)
        assert trace is not None
        return trace.bill

    @property
    def total(self) -> float:
        return self.bills.total(KEY).amount


def test_a_step_is_billed_once_however_often_it_is_told() -> None:
    world = World()
    world.begin("s")
    world.beat(("s", 1, Spent(decode_s=1.0)))
    world.beat(("s", 1, Spent(decode_s=1.0)))
    assert (world.bill, world.total) == (FREE, 2.0)
    world.bills.told(world.life, StepId("s"), Reading(1, Spent(decode_s=3.0)), done=True)
    world.beat(("s", 1, Spent(decode_s=2.0)))  # it was on its way for longer
    world.end("s")
    assert world.bill == Bill(Spent(decode_s=3.0), 6.0, 6.0)
    assert world.bills.bill(StepId("s")).amount == world.total == 6.0
    world.beat(("s", 1, Spent(decode_s=3.0)))
    assert world.bill.amount == 6.0


def test_all_attempts_count_each_at_its_workers_price() -> None:
    world = World()
    world.begin("s")
    world.beat(("s", 1, Spent(decode_s=1.0)), ("s", 2, Spent(recompute_s=1.0)))
    world.beat(("s", 1, Spent(prefill_s=5.0)), node=PREFILL)
    world.end("s")
    assert world.bill == Bill(Spent(5.0, 1.0, 1.0), 9.0, 9.0)


def test_what_comes_late_is_added_and_what_comes_too_late_is_not() -> None:
    world = World()
    world.begin("s")
    world.end("s")
    world.beat(("s", 1, Spent(decode_s=1.0)))
    assert world.bill.amount == 2.0
    world.now_s += LATE_S + 1.0
    world.begin("other")
    world.end("other")
    world.beat(("s", 1, Spent(decode_s=9.0)))
    assert world.bill.amount == 2.0


def test_a_step_that_is_asked_for_again_is_not_billed_again_for_what_it_took_before() -> None:
    world = World()
    world.begin("s")
    world.beat(("s", 1, Spent(decode_s=1.0)))
    world.end("s")
    world.begin("s")
    world.beat(("s", 1, Spent(decode_s=1.5)), ("s", 2, Spent(decode_s=4.0)))
    assert world.bills.bill(StepId("s")).spent == Spent(decode_s=4.5)
    world.end("s")
    assert world.bill.amount == 11.0


def test_steps_that_are_not_this_routers_are_not_billed_here() -> None:
    world = World()
    world.begin("s")
    world.beat(("elsewhere", 1, Spent(decode_s=1.0)))
    world.bills.told(world.life, StepId("elsewhere"), Reading(1, Spent(decode_s=1.0)), done=True)
    assert world.total == 0.0


def test_a_step_of_a_former_life_is_billed_by_who_has_its_trace_now() -> None:
    world = World()
    world.begin("other")
    world.end("other")
    world.bills.adopted(StepId("s"), KEY, world.now_s)
    world.beat(("s", 1, Spent(decode_s=4.0)))
    assert world.bill.amount == 8.0


def test_what_rests_is_the_traces_and_known_to_it_with_its_next_step() -> None:
    world = World()
    world.begin("s")
    world.end("s")
    world.beat(new=True)
    world.beat(("", 7, Spent(resident_byte_s=5.0)))
    world.beat(("", 7, Spent(resident_byte_s=5.0)))
    assert (world.bill.amount, world.total) == (0.0, 5.0)
    world.begin("next")
    world.end("next")
    assert world.bill == Bill(Spent(resident_byte_s=5.0), 0.0, 5.0)
    assert world.total == 5.0


def test_what_rested_before_this_router_was_there_was_anothers_to_bill() -> None:
    world = World()
    world.begin("s")
    world.end("s")
    world.beat(("", 7, Spent(resident_byte_s=5.0)))
    world.beat(("", 7, Spent(resident_byte_s=6.0)))
    assert world.total == 1.0


# --- budgets ----------------------------------------------------------------------------------------------------


def test_a_step_is_allowed_what_is_left_and_the_next_is_refused_with_what_to_do() -> None:
    world, limits = World(), Limits(10.0)
    world.begin("s", limits)
    assert world.bills.allowance(StepId("s"), DECODE, PREFILL) == Allowance(10.0, 1.0, 2.0)
    world.beat(("s", 1, Spent(decode_s=3.0)))
    assert world.bills.allowance(StepId("s"), DECODE, None) == Allowance(4.0, 2.0, 2.0)
    world.bills.told(world.life, StepId("s"), Reading(1, Spent(decode_s=5.25)), done=True)
    world.end("s")
    with pytest.raises(BudgetExceeded, match=r"10\.5 of 10 USD are spent\. To go on, say a larger one"):
        world.begin("next")
    world.begin("next", Limits(20.0))
    assert world.bills.allowance(StepId("next"), DECODE, None) == Allowance(9.5, 2.0, 2.0)


def test_steps_at_once_share_a_budget() -> None:
    world = World()
    for number, choices in enumerate((3, 2, 1)):
        world.begin(f"s-{number}", Limits(9.0), choices)
        assert world.bills.allowance(StepId(f"s-{number}"), DECODE, None) == Allowance(3.0, 2.0, 2.0)
    with pytest.raises(BudgetExceeded, match="9 are for steps that run"):
        world.begin("more")
    world.end("s-0")
    world.begin("more")
    assert world.bills.allowance(StepId("more"), DECODE, None) == Allowance(3.0, 2.0, 2.0)


def test_what_a_step_may_have_taken_that_broke_off_is_not_given_to_the_next() -> None:
    world = World()
    world.begin("s", Limits(10.0))
    world.bills.allowance(StepId("s"), DECODE, None)
    world.now_s += 2.0  # of which nobody has said anything: at most four seconds' worth of workers
    world.end("s")
    world.begin("next")
    allowance = world.bills.allowance(StepId("next"), DECODE, None)
    assert allowance is not None
    assert allowance.amount == 10.0 - 2.0 * 4.0
    world.end("next")
    world.now_s += HOLD_S + 0.1
    world.begin("last")
    assert world.bills.allowance(StepId("last"), DECODE, None) == Allowance(10.0, 2.0, 2.0)


def test_a_trace_without_a_budget_takes_what_it_takes() -> None:
    world = World()
    world.begin("s")
    assert world.bills.allowance(StepId("s"), DECODE, None) is None


def test_what_rests_is_paid_up_to_the_budget() -> None:
    world = World()
    world.begin("s", Limits(10.0))
    world.bills.told(world.life, StepId("s"), Reading(1, Spent(decode_s=4.0)), done=True)
    world.end("s")
    world.beat(new=True)
    world.beat(("", 7, Spent(resident_byte_s=5.0)))
    assert world.total == 10.0


def test_a_deadline_counts_from_the_traces_beginning() -> None:
    world = World()
    assert world.begin("s", Limits(None, 30.0)) == 130.0
    world.end("s")
    world.now_s += 20.0
    assert world.begin("next") == 130.0
    world.end("next")
    world.now_s += 10.0
    with pytest.raises(TraceLate, match="say a later deadline"):
        world.begin("late")
    assert world.begin("late", Limits(None, 60.0)) == 160.0


@pytest.mark.parametrize(
    ("headers", "metadata", "expected"),
    [
        ({}, None, UNLIMITED),
        ({"x-trace-budget": "0.5"}, {"trace_budget": 9}, Limits(0.5)),
        ({"x-trace-deadline-s": "60"}, {"trace_budget": "2.5"}, Limits(2.5, 60.0)),
        ({}, {"trace_deadline_s": 7, "else": []}, Limits(None, 7.0)),
    ],
)
def test_what_a_client_allows(headers: dict[str, str], metadata: dict[str, object] | None, expected: Limits) -> None:
    assert allowed(headers, metadata) == expected


@pytest.mark.parametrize("value", ["", "0", "-1", "nan", "inf", "1e300", "9" * 5000, "much"])
def test_what_is_no_budget_is_refused(value: str) -> None:
    for headers, metadata in (({"x-trace-budget": value}, None), ({}, {"trace_budget": value})):
        with pytest.raises(CallFailed, match="above 0 and up to"):
            allowed(headers, metadata)


@pytest.mark.parametrize("value", [True, [], {}, 10**400])
def test_nor_is_what_is_no_number(value: object) -> None:
    with pytest.raises(CallFailed, match=r"metadata\.trace_deadline_s"):
        allowed({}, {"trace_deadline_s": value})


# --- writing down -----------------------------------------------------------------------------------------------


async def written(documents: MemoryDocuments) -> Report:
    kept = await documents.list(SHELF, {}, None, 1000)
    return report(msgspec.msgpack.decode(document.body, type=Page) for document in kept)


def test_what_is_billed_outlives_the_router_and_is_there_once() -> None:
    documents = MemoryDocuments()

    async def main() -> None:
        world = World()
        keeper = BillKeeper(world.bills, documents, "router-0/a", 1e9, clock.now_s)
        async with keeper:
            world.begin("s")
            world.beat(("s", 1, Spent(decode_s=1.0)), new=True, up_s=5.0)
            world.end("s")
            await asyncio.sleep(PAGE_LATE_S + 0.1)
            assert (await written(documents)).rows[0].bill.amount == 2.0
            documents.lost = "full"
            world.beat(("s", 1, Spent(decode_s=2.0)), up_s=8.0)
            await asyncio.sleep(70.0)
            documents.lost = None
            await asyncio.sleep(PAGE_LATE_S + 0.1)
            found = await written(documents)
            rows = [(row.trace, row.tenant, row.steps, row.bill.amount) for row in found.rows]
            assert rows == [("t", "acme", 1, 4.0)]
            world.bills.gone(NodeInfo(DECODE, Generation(1), "decode", ""), 1.5)
        found = await written(documents)
        assert {line.what: line.seconds for line in found.fleet} == {"idle": 8.0, "lost": 1.5, "unclaimed": -2.0}
        assert found.total.seconds == 9.5
        assert world.bills.readings.workers == {}

    run(main, 0)


def test_who_died_while_no_router_was_there_is_found_in_what_the_last_one_wrote() -> None:
    documents = MemoryDocuments()

    async def main() -> None:
        world = World()
        async with BillKeeper(world.bills, documents, "router-0/a", 1e9, clock.now_s):
            world.beat(("s", 1, Spent(decode_s=1.0)), new=True, up_s=5.0)
        assert len(documents.kept[SHELF]) == 1
        documents.kept[SHELF]["torn"] = documents.kept[SHELF]["router-0/a/0"]._replace(name="torn", body=b"")
        for _ in range(2):  # what cannot be read is in nobody's way
            async with BillKeeper(World().bills, documents, "router-0/b", 1e9, clock.now_s):
                await asyncio.sleep(30.0)
            documents.kept[SHELF].pop("torn", None)
        async with BillKeeper(World().bills, documents, "router-0/c", 1e9, clock.now_s):
            await asyncio.sleep(30.0)
        found = await written(documents)
        assert {line.what: line.seconds for line in found.fleet}["lost"] == 0.75

    run(main, 0)


def test_old_pages_go() -> None:
    documents = MemoryDocuments()

    async def main() -> None:
        world = World()
        async with BillKeeper(world.bills, documents, "router-0/a", 1e9, clock.now_s):
            pass
        assert list(documents.kept[SHELF]) == ["router-0/a/0"]
        async with BillKeeper(world.bills, documents, "router-0/b", 1e-6):
            pass
        assert "router-0/a/0" not in documents.kept[SHELF]

    run(main, 0)


# --- what stores hold -------------------------------------------------------------------------------------------


class Members:
    """One worker, whose KV takes ten bytes a token."""

    def infos(self) -> tuple[NodeInfo, ...]:
        return (NodeInfo(DECODE, Generation(1), "decode", "", limits=WorkerLimits(kv_tokens_max=100)),)

    def load(self, node: NodeId) -> NodeLoad:
        return NodeLoad(bytes_max=1000)


def holding(name: str, blocks: str, **more: Any) -> Trace:
    """A trace whose last context has these blocks, of four tokens each."""
    hashes = [BlockHash(letter.encode() * 16) for letter in blocks]
    left = Left(StepId("s"), BlockHash(b"r" * 16), 4, bytes(16 * len(blocks)), joined(hashes), 0, None)
    return with_kept(
        Trace((KEY[0], TraceId(name)), 0.0, worker=DECODE, steps_count=1, idle_since_s=0.0, **more), [left], []
    )


def test_what_stores_hold_is_charged_by_tier_and_shared_among_those_that_have_it() -> None:
    async def main() -> None:
        world, index = World(Prices(Tariff("USD", memory_gib_hour=3600 * 2.0**30))), Index()
        for trace in (
            holding("a", "xyz"),
            holding("b", "xw"),
            holding("c", "v"),
            holding("p", "x", limits=Limits(10.0)),
        ):
            world.traces.restore(trace, ())
        memory, below = [BlockHash(letter * 16) for letter in (b"x", b"y")], [BlockHash(b"z" * 16)]
        index.snapshot(NodeId("s"), Snapshot(Generation(1), 1, tuple(memory), tier=0, last=False))
        index.snapshot(NodeId("s"), Snapshot(Generation(1), 1, tuple(below), tier=1, last=True))
        look = Holdings(world.traces, index, cast(Any, Members()), world.bills).look
        await look()
        assert not any(world.bills.total(trace.key).amount for trace in world.traces.all())
        await asyncio.sleep(30.0)
        await look()
        spent = {trace.trace: world.bills.total(trace.key).spent for trace in world.traces.all()}
        block = 4 * 10 * 30.0
        assert spent["a"] == Spent(memory_byte_s=pytest.approx(block * 4 / 3), disk_byte_s=pytest.approx(block))
        assert spent["b"] == Spent(memory_byte_s=pytest.approx(block / 3))
        assert spent["c"] == Spent()
        assert world.bills.total((KEY[0], TraceId("a"))).amount == pytest.approx(block * 4 / 3)
        assert world.bills.total((KEY[0], TraceId("p"))).amount == 10.0, "no more than its budget"

    run(main, 0)


def test_a_trace_does_not_pay_for_what_was_kept_of_another_of_its_name() -> None:
    world = World()
    world.begin("a")
    world.end("a")
    world.bills.keeps(KEY, Bill(amount=3.0))
    assert world.total == 3.0
    world.send(Deleted(KEY))
    assert (world.begin("b", Limits(budget=2.0)), world.total) == (None, 0.0)
