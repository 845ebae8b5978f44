"""What it costs, and what a trace may still cost."""

import pytest

from router.policy.bill_pages import FleetLine, Page, TraceRow, WorkerRow, report
from router.policy.prices import FREE, GIB, Bill, Limits, Prices, Tariff, share
from tracehaul.wire.ids import Generation, NodeId, TraceId
from tracehaul.wire.spent import Spent

A, B = NodeId("decode-a"), NodeId("decode-b")


def test_a_bill_is_quantities_times_prices() -> None:
    tariff = Tariff("USD", 7.2, resident_gib_hour=3.6, memory_gib_hour=0.36, disk_gib_hour=0.036, moved_gib=5.0)
    prices = Prices(tariff, {A: 36.0})
    spent = Spent(1.0, 2.0, 3.0, int(2 * GIB), 1000 * GIB, 1000 * GIB, 1000 * GIB)
    assert prices.bill(B, spent) == Bill(spent, pytest.approx(0.012), pytest.approx(0.012 + 1.11 + 10.0))
    assert prices.bill(A, spent).worker_amount == pytest.approx(0.06)
    assert prices.second(None) == pytest.approx(0.002)


def test_without_prices_a_bill_counts_workers_seconds() -> None:
    spent = Spent(1.0, 2.0, 3.0, 10**12, 1e15, 1e15, 1e15)
    assert Prices(Tariff()).bill(A, spent) == Bill(spent, 6.0, 6.0)


@pytest.mark.parametrize(("left", "amount"), [(10.0, 8.0), (7.0, 7.0), (1.0, 5.0), (0.0, 5.0)])
def test_beyond_a_budget_only_workers_time_is_paid(left: float, amount: float) -> None:
    assert Bill(Spent(5.0), 5.0, 8.0).within(left) == Bill(Spent(5.0), 5.0, amount)


def test_what_a_later_call_says_counts_and_what_it_does_not_say_stays() -> None:
    assert Limits(None, 9.0).after(Limits(5.0, 3.0)) == Limits(5.0, 9.0)
    assert Limits(7.0).after(Limits(5.0)) == Limits(7.0)


def test_steps_that_begin_together_get_as_much_each() -> None:
    left, given = 6.0, list[float]()
    for choices in (3, 2, 1):
        given.append(share(left, choices))
        left -= given[-1]
    assert given == [2.0, 2.0, 2.0]
    assert share(-1.0, 1) == 0.0


def worker(node: NodeId, up: tuple[float, float], busy: tuple[float, float], unheard_s: float = 0.0) -> WorkerRow:
    return WorkerRow(node, Generation(1), "decode", "", 2.0, *up, *busy, unheard_s)


def row(trace: str, seconds: float) -> TraceRow:
    return TraceRow("", TraceId(trace), "t", 1, Bill(Spent(decode_s=seconds), 2 * seconds, 3 * seconds))


def test_traces_and_what_is_nobodys_add_up_to_what_the_workers_cost() -> None:
    pages = [
        Page(1, "USD", (row("x", 3.0), row("y", 1.0)), (worker(A, (0.0, 60.0), (0.0, 4.0)),)),
        Page(
            2, "USD", (row("x", 2.0),), (worker(A, (60.0, 100.0), (4.0, 7.0)), worker(B, (0.0, 10.0), (0.0, 2.0), 1.5))
        ),
    ]
    told = report(reversed(pages))
    assert [(line.trace, line.steps, line.bill.spent.decode_s, line.bill.amount) for line in told.rows] == [
        ("x", 2, 5.0, 15.0),
        ("y", 1, 1.0, 3.0),
    ]
    idle, lost, unclaimed = told.fleet
    assert idle == FleetLine("idle", 101.0, 202.0)
    assert lost == FleetLine("lost", 1.5, 3.0)
    assert unclaimed == FleetLine("unclaimed", 3.0, 6.0)
    assert told.total == FleetLine("total", 111.5, 223.0)
    billed = sum((line.bill for line in told.rows), FREE)
    assert billed.worker_amount + sum(line.amount for line in told.fleet) == pytest.approx(told.total.amount)


def test_two_routers_and_a_gap_make_no_difference() -> None:
    heard = Page(1, "USD", (), (worker(A, (0.0, 60.0), (0.0, 4.0)),))
    again = Page(1, "USD", (), (worker(A, (1.0, 59.0), (0.5, 4.0)),))
    back = Page(9, "USD", (), (worker(A, (500.0, 600.0), (40.0, 50.0)),))
    gone = Page(2, "USD", (), (worker(A, (60.0, 70.0), (4.0, 5.0), 10.0),))
    assert report([heard, again]) == report([heard])
    assert report([heard, gone, back]).total == FleetLine("total", 600.0, 1200.0)  # it was not gone after all
    assert report([heard, gone]).fleet[1] == FleetLine("lost", 10.0, 20.0)
