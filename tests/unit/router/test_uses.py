"""Whose trace is forgotten first, while calls wait."""

from router.traces.events import CallOver, Recognised
from router.traces.uses import STALE_MAX
from tests.opcodes import opcodes
from tests.unit.router.test_traces import Machine, key


def wait(m: Machine, calls: int) -> None:
    """So many calls, none of which has a step."""
    for at in range(calls):
        m.send(Recognised(key(f"call-{at}"), (b"%016d" % at,)), 1.0)


def test_calls_that_wait_take_no_traces_place() -> None:
    m = Machine(traces_max=2)
    m.step("a", 0.0)
    m.step("b", 0.5)
    wait(m, 50)
    assert (len(m.traces), m.traces.get(key("a")) is None) == (52, False)
    m.step("call-7", 2.0)
    m.send(CallOver(key("call-7")), 3.0)
    assert m.traces.get(key("a")) is None, "its first step has begun: it is a trace as others"
    assert m.traces.get(key("b")) is not None
    for at in range(50):
        m.send(CallOver(key(f"call-{at}")), 4.0)
    assert len(m.traces) == 2
    m.traces.check()


def cost(calls: int) -> int:
    """Of what happens to one trace, while so many calls wait and too many traces run."""
    m = Machine(traces_max=2)
    wait(m, calls)
    for at in range(3):
        m.begin(f"runs-{at}", 2.0)
    return opcodes(lambda: m.traces.handle(Recognised(key("one"), (b"x" * 16,)), 3.0))


def test_what_happens_costs_the_same_however_many_wait() -> None:
    few = cost(10)
    assert few > 50
    assert cost(1000) < few + 50


def test_nothing_is_left_of_those_that_were_used_often() -> None:
    m = Machine(traces_max=4)
    for at in range(3 * STALE_MAX):
        m.step("abc"[at % 3], float(at))
    assert len(m.traces) == 3
    m.traces.check()
