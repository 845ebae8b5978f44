"""What pages of bills say together, whoever has written them, and however often."""

import msgspec
import pytest

from router.dispatch.readings import FORGET_S, SETTLES_S, UNWRITTEN_MAX_S, Readings
from router.policy.bill_pages import AccountRow, LifeRows, Page, Report, TraceRow, WorkerRow, report
from router.policy.prices import Bill, Prices, Tariff
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.ids import Generation, NodeId, StepId, TraceId
from tracehaul.wire.spent import Charge, Reading, Spent

NODE, TRACE = NodeId("decode-0"), TraceId("t")
PRICES = Prices(Tariff("USD", 7200.0))
"""Two a second."""


class Router:
    """One life of one router: what it hears, and the pages that it writes."""

    def __init__(self, at_us: int = 0, knows: str = "", prices: Prices = PRICES) -> None:
        self.readings = Readings(lambda key: knows)
        self.at_us = at_us
        self.prices = prices
        self.now_s = 1000.0
        self.pages: list[Page] = []

    def hears(
        self, up_s: float, *spent: float, new: bool = False, generation: int = 1, began_s: float = 0.0, tenant: str = ""
    ) -> None:
        """A worker that was busy for the sum of its accounts, the first of which was opened then."""
        charges = tuple(
            Charge("salt", TRACE, StepId("s"), Reading(), tenant, Reading(number, Spent(decode_s=seconds)), began_s)
            for number, seconds in enumerate(spent, 1)
        )
        info = NodeInfo(NODE, Generation(generation), "decode", "")
        self.readings.heard(info, NodeLoad(up_s=up_s, busy_s=sum(spent), charges=charges), self.now_s, new=new)

    def writes(self, count_max: int = 2000) -> list[Page]:
        """Its page, which is over then."""
        self.at_us += 1
        workers = self.readings.worker_rows(self.prices)
        parts = list(self.readings.account_rows(self.prices, count_max)) or [()]
        made = [Page(self.at_us, "USD", (), workers, part, self.prices.tariff, self.at_us) for part in parts]
        self.readings.turn(self.now_s)
        self.pages += made
        return made


def lines(found: Report) -> dict[str, float]:
    """In seconds, and what is billed."""
    billed = sum(row.bill.spent.worker_s for row in found.rows)
    return {"billed": billed, **{line.what: line.seconds for line in found.fleet}}


def test_an_account_counts_once_whoever_has_heard_it_and_however_often() -> None:
    one, other = Router(0, knows="acme"), Router(100)
    one.hears(10.0, 4.0, new=True)
    one.writes()
    one.hears(20.0, 7.0, 1.0)
    other.hears(15.0, 6.0)
    other.hears(21.0, 8.0, 1.0)
    found = report([*one.writes(), *other.writes(), *one.pages[:1], *other.pages])
    assert lines(found) == {"billed": 9.0, "idle": 12.0, "lost": 0.0, "unclaimed": 0.0}
    assert [(row.tenant, row.bill.amount) for row in found.rows] == [("acme", 18.0)]


def test_what_a_router_took_with_it_is_billed_by_the_next() -> None:
    one, later = Router(0), Router(100)
    one.hears(10.0, 4.0, new=True)
    one.writes()
    one.hears(20.0, 7.0, 1.0)  # and dies before it has written that
    later.hears(30.0, 9.0, 2.0, began_s=8.0)
    assert lines(report(one.pages + later.writes())) == {"billed": 11.0, "idle": 19.0, "lost": 0.0, "unclaimed": 0.0}


def test_of_an_earlier_time_nothing_is_billed_again() -> None:
    """``tracehaul bill --from`` that moment."""
    later = Router()
    later.hears(30.0, 9.0, 2.0, began_s=8.0)
    first = later.writes()
    later.hears(40.0, 12.0, 2.0)
    later.hears(40.0, 12.0, 2.0, 3.0)
    assert lines(report(first)) == {"billed": 0.0, "idle": 0.0, "lost": 0.0, "unclaimed": 0.0}
    both = {"billed": 6.0, "idle": 4.0, "lost": 0.0, "unclaimed": 0.0}
    second = later.writes()
    assert lines(report(second)) == lines(report(first + second)) == both


def test_late_and_repeated_heartbeats_say_nothing_new() -> None:
    one = Router()
    one.hears(10.0, 4.0, new=True)
    one.hears(9.0, 3.0)
    one.hears(10.0, 4.0)
    assert lines(report(one.writes()))["billed"] == 4.0
    one.hears(10.0, 4.0)
    assert one.readings.count == 0


def test_each_growth_costs_what_it_did_then() -> None:
    one = Router(knows="acme")
    one.hears(10.0, 4.0, new=True)
    one.writes()
    one.prices = Prices(Tariff("USD", 36000.0))
    one.hears(20.0, 5.0)
    found = report([*one.writes(), *one.pages])
    assert found.rows[0].bill.amount == 4 * 2.0 + 1 * 10.0
    assert {line.what: line.amount for line in found.fleet} == {"idle": 6 * 2.0 + 9 * 10.0, "lost": 0, "unclaimed": 0}


def test_what_was_prefill_may_turn_out_to_be_recompute() -> None:
    rows = [
        AccountRow(1, "", TRACE, "", 0.0, Spent(), Spent(prefill_s=3.0)),
        AccountRow(1, "", TRACE, "", 0.0, Spent(prefill_s=3.0), Spent(1.0, 2.0, 1.0)),
    ]
    pages = [Page(at, "", (), (), (LifeRows(NODE, Generation(1), 1.0, (row,)),)) for at, row in enumerate(rows)]
    assert report(pages).rows[0].bill.spent == Spent(1.0, 2.0, 1.0)


def test_pages_of_earlier_versions_are_read_beside_those_of_now() -> None:
    old = {
        "at_us": 5,
        "unit": "USD",
        "rows": [["salt", "t", "acme", 1, [[0.0, 0.0, 3.0, 0, 0.0, 0.0, 0.0], 6.0, 6.0]]],
        "workers": [[NODE, 1, "decode", "", 2.0, 0.0, 10.0, 0.0, 3.0, 0.0]],
    }
    page = msgspec.msgpack.decode(msgspec.msgpack.encode(old), type=Page)
    later = Router(100)  # its router has another version now, the worker has not
    later.hears(12.0, 3.5)
    later.hears(20.0, 6.5)
    found = report([page, *later.writes()])
    assert [(row.tenant, row.steps, row.bill.worker_amount) for row in found.rows] == [("acme", 1, 6.0 + 6.0)]


def test_what_lies_beyond_a_budget_is_not_billed_however_often_that_is_said() -> None:
    lies = Bill(amount=-3.0)
    account = AccountRow(1, "", TRACE, "", 0.0, Spent(), Spent(decode_s=1.0, resident_byte_s=4.0))
    tariff = Tariff(resident_gib_hour=3600 * 2.0**30)
    rows = (LifeRows(NODE, Generation(1), 1.0, (account,)),)
    page = Page(0, "", (TraceRow("", TRACE, "", 1, lies),), (), rows, tariff)
    again = Page(1, "", (TraceRow("", TRACE, "", 0, lies),), ())
    assert [report(pages).rows[0].bill.amount for pages in ([page], [page, again])] == [2.0, 1.0]


def test_a_page_has_so_many_rows_and_more_are_on_the_next() -> None:
    one = Router(knows="acme")
    one.hears(10.0, *[0.5] * 7, new=True)
    assert one.readings.count == 7
    made = one.writes(count_max=3)
    assert [sum(len(life.rows) for life in page.accounts) for page in made] == [3, 3, 1]
    assert lines(report(made))["billed"] == 3.5
    assert one.readings.count == 0


def test_what_is_not_heard_any_more_is_forgotten() -> None:
    one = Router()
    one.hears(10.0, 4.0, 1.0, new=True)
    one.now_s += FORGET_S
    one.hears(20.0, 4.0, 2.0)
    one.now_s += 1.0
    one.writes()
    (worker,) = one.readings.workers.values()
    assert list(worker.shown) == [1, 2], "also what shows nothing new was heard of"
    one.now_s += FORGET_S
    one.writes()
    assert not worker.shown
    one.readings.gone(worker.info, 0.5)
    one.writes()
    assert one.readings.workers == {}


def left(up_to: float, generation: int = 1, *, gone: bool = False) -> WorkerRow:
    return WorkerRow(NODE, Generation(generation), "decode", "", 2.0, 0.0, up_to, 0.0, 1.0, 0.5 * gone, gone)


@pytest.mark.parametrize("early", [True, False])
def test_a_worker_that_died_while_no_router_was_there_is_lost_from_when_it_was_heard(early: bool) -> None:
    """On average in the middle of the time in which it may have."""
    later = Router()
    if early:  # it is a member before the router has read what there was
        later.hears(1.0, generation=2, new=True)
    later.readings.left([(left(8.0), 990.0), (left(10.0), 998.0), (left(70.0, 5, gone=True), 999.0)], 1000.0)
    later.hears(1.0, generation=2, new=True)
    assert lines(report(later.writes())) == {"billed": 0.0, "idle": 1.0, "lost": 0.5, "unclaimed": 0.0}


def test_one_that_does_not_come_back_is_lost_and_one_that_does_is_not() -> None:
    for comes in (True, False):
        later = Router()
        later.readings.left([(left(10.0), 900.0)], 1000.0)
        if comes:
            later.hears(120.0, 1.0)
        later.readings.settle(1000.0 + SETTLES_S - 1.0)
        assert lines(report(later.writes()))["lost"] == 0.0
        later.readings.settle(1000.0 + SETTLES_S)
        assert lines(report(later.writes()))["lost"] == (0.0 if comes else UNWRITTEN_MAX_S / 2)
