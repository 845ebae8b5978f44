"""Who is next of those who wait, and when steps go to workers."""

import random

import numpy as np
import pytest

from router.fleet.load import Key, WorkerTable
from router.policy.order import PAST_MAX, Order, Stretch, Waiter
from router.policy.turns import HEADROOM_SHARE, MEMORY_SHARE, QUEUE_S, STALLED_S, Turns, has_room, served_s
from tracehaul.wire.cluster import NodeInfo, NodeLoad, WorkerLimits
from tracehaul.wire.ids import Generation, NodeId

LIFE = Generation(1)
STRETCH = Stretch()


def order(**waiters: Waiter) -> Order[str]:
    made = Order[str](STRETCH)
    for name, waiter in waiters.items():
        made.join(name, waiter)
    return made


def drained(line: Order[str], now_s: float = 0.0) -> str:
    names = ""
    while (name := line.first(now_s)) is not None:
        line.goes(name)
        names += name
    assert not len(line)
    return names


def test_who_came_first_goes_first_but_short_work_and_traces_that_had_little_before_others() -> None:
    assert drained(order(a=Waiter(1.0), b=Waiter(2.0), c=Waiter(3.0))) == "abc"
    assert drained(order(long=Waiter(0.0, takes_s=8.0), b=Waiter(1.0, takes_s=0.1))) == "blong"
    assert drained(order(had=Waiter(0.0, given_s=90.0), new=Waiter(1.0))) == "newhad"


def test_a_trace_that_begins_waits_for_those_that_go_on_but_not_for_ever() -> None:
    assert drained(order(new=Waiter(0.0, begins=True), on=Waiter(STRETCH.begins - 1))) == "onnew"
    assert drained(order(new=Waiter(0.0, begins=True), on=Waiter(STRETCH.begins + 1))) == "newon"


def test_whoever_waits_goes_before_all_that_come_after_some_time() -> None:
    line = order(z=Waiter(0.0, takes_s=10.0, given_s=20.0))
    went = ""
    for second in range(1, 400):
        name = f"{second % 10}"
        line.join(name, Waiter(float(second), takes_s=0.1))
        first = line.first(float(second))
        assert first is not None
        line.goes(first)
        went += first
        if first == "z":
            break
    assert went.endswith("z"), "new short work comes all the time, and does not hold it up for ever"


def test_tenants_take_turns_by_what_they_took_for_their_weight() -> None:
    line = Order[str](STRETCH)
    for number in range(40):
        line.join(f"big-{number}", Waiter(0.0, ("big", 1.0), takes_s=1.0))
    for number in range(10):
        line.join(f"small-{number}", Waiter(1.0, ("small", 1.0), decodes_s=1.0))
        line.join(f"quick-{number}", Waiter(1.0, ("quick", 4.0), takes_s=1.0))
    first: list[str] = []
    for _ in range(15):
        name = line.first(2.0)
        assert name is not None
        line.goes(name)
        first.append(name.split("-")[0])
    assert first.count("quick") in (9, 10), "four for each of the others"
    assert abs(first.count("big") - first.count("small")) <= 1


def test_who_waits_for_nothing_saves_nothing_up_and_owes_what_it_took() -> None:
    line = Order[str](STRETCH)
    for number in range(20):
        line.join(f"a{number}", Waiter(0.0, ("a", 1.0), takes_s=1.0))
        line.goes(f"a{number}")
    line.join("a", Waiter(1.0, ("a", 1.0), takes_s=1.0))
    line.join("b", Waiter(2.0, ("b", 1.0), takes_s=1.0))
    assert line.first(2.0) == "b"
    line.goes("b")
    for number in range(30):
        line.join(f"c{number}", Waiter(3.0, ("c", 1.0), takes_s=1.0))
    went = ""
    while "a" in line:
        name = line.first(4.0)
        assert name is not None
        line.goes(name)
        went += name[0]
    assert went.count("c") <= 20, "no more than the other had before it came"


def test_a_near_deadline_goes_first_and_a_lost_one_gains_nothing() -> None:
    line = order(a=Waiter(0.0), b=Waiter(1.0, takes_s=2.0, deadline_s=20.0), c=Waiter(2.0, deadline_s=12.0))
    assert line.first(2.0) == "a", "there is time"
    assert line.first(11.5) == "c"
    assert line.first(15.0) == "a", "c's is lost"
    assert line.first(16.5) == "b"
    assert line.first(18.1) == "a"
    one = Order[str](STRETCH)
    one.join("mine", Waiter(0.0, ("x", 1.0), deadline_s=1.5))
    one.join("yours", Waiter(0.0, ("y", 1.0)))
    one.goes("mine")
    one.join("mine too", Waiter(0.0, ("x", 1.0), takes_s=1.0, deadline_s=2.0))
    one.goes("mine too")
    one.join("again", Waiter(0.0, ("x", 1.0), deadline_s=1.5))
    assert one.first(1.0) == "yours", "a deadline gains nothing on other tenants"


def test_priority_counts_among_a_tenants_own() -> None:
    assert drained(order(a=Waiter(0.0), b=Waiter(50.0, takes_s=9.0, priority=1))) == "ba"


def test_leaving_and_coming_back_leave_nothing_behind() -> None:
    dice = random.Random(7)
    line, there = Order[int](STRETCH), set[int]()
    for turn in range(20_000):
        name = dice.randrange(50)
        if name in there:
            (line.goes if dice.random() < 0.5 else line.leave)(name)
            there.discard(name)
        else:
            group = (f"tenant-{dice.randrange(2 * PAST_MAX)}", 1.0)
            line.join(name, Waiter(turn, group, takes_s=dice.random(), deadline_s=turn + dice.choice([2.0, 1e9])))
            there.add(name)
        first = line.first(float(turn))
        assert (first in there) if there else first is None
    for name in there:
        line.leave(name)
        line.leave(name)
    assert line.first(0.0) is None
    assert not len(line)


def workers(*kv_tokens: int) -> WorkerTable:
    made = WorkerTable()
    infos = [
        NodeInfo(NodeId(f"d{row}"), LIFE, "decode", "", limits=WorkerLimits(kv_tokens_max=tokens))
        for row, tokens in enumerate(kv_tokens)
    ]
    made.sync(infos, [NodeLoad(token_s=1e-3, decode_s=0.02)] * len(infos))
    return made


NONE = WorkerTable()


def test_a_step_goes_where_there_is_memory_and_nothing_much_to_compute_before_it() -> None:
    table = workers(1000, 2000)
    assert has_room(table, NONE, 1800, 0.0), "of a worker that does nothing the worker itself knows whether it fits"
    table.sent(table.keys[1], 0.0, 0.0, 1000)
    assert has_room(table, NONE, 600, 0.0)
    table.sent(table.keys[0], 0.0, 0.0, 600)
    assert has_room(table, NONE, int((MEMORY_SHARE - HEADROOM_SHARE) * 2000) - 1000, 0.0)
    assert not has_room(table, NONE, int((MEMORY_SHARE - HEADROOM_SHARE) * 2000) - 999, 0.0)
    table.sent(table.keys[1], 2 * QUEUE_S, 0.0, 10)
    assert not has_room(table, NONE, 600, 0.0), "it would wait for others' prompts"
    table.ended(table.keys[0], 0.0, computed=False, tokens=600)
    assert has_room(table, NONE, 600, 0.0)
    assert np.allclose(table.sent_tokens, [0.0, 1010.0])
    assert has_room(NONE, NONE, 5, 0.0), "who serves nothing refuses it"
    assert has_room(workers(0), NONE, 10**9, 0.0), "and what a worker does not tell is no reason"


def test_prompts_may_be_computed_by_prefill_workers_too() -> None:
    table, prefills = workers(1000), workers(1000)
    table.sent(table.keys[0], 2 * QUEUE_S, 0.0, 10)
    assert not has_room(table, NONE, 10, 0.0)
    assert has_room(table, prefills, 10, 0.0)
    prefills.sent(Key(NodeId("d0"), LIFE), 2 * QUEUE_S, 0.0)
    assert not has_room(table, prefills, 10, 0.0)


def test_turns_come_as_steps_end_or_when_nothing_has_happened_for_long() -> None:
    table, turns = workers(1000), Turns[str]()
    table.sent(table.keys[0], 0.0, 0.0, 900)
    turns.join("a", Waiter(5.0), 500)
    turns.join("b", Waiter(6.0), 100)
    turns.join("c", Waiter(7.0), 100)
    assert turns.next(table, NONE, 7.0) is None, "nor does b overtake: a would never have room"
    turns.leave("b")
    table.ended(table.keys[0], 0.0, computed=False, tokens=900)
    turns.moved(8.0)
    assert turns.next(table, NONE, 8.0) == "a"
    table.sent(table.keys[0], 0.0, 8.0, 900)
    assert turns.next(table, NONE, 8.0) is None
    assert turns.next(table, NONE, 8.0 + STALLED_S) == "c", "its worker may be dead, or others' counts wrong"
    assert turns.next(table, NONE, 99.0) is None
    assert not len(turns.order)


def test_what_tokens_took_is_told_by_the_rates_of_now() -> None:
    table = workers(1000, 1000)
    assert served_s(table, 100, 50) == pytest.approx(100 * 1e-3 + 50 * 0.02)
    assert served_s(NONE, 100, 50) == 0.0
