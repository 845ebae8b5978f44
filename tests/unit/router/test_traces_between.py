"""What becomes of traces between their steps, and of what is deleted."""

import gc
import sys

import pytest

from router.fleet.load import Warm
from router.traces.decisions import Moved, Recalled, Retained
from router.traces.effects import BringBack, EndPin, FreeContext, SetPin, StopRecall, StopSteps
from router.traces.events import (
    ContextRecalled,
    Deleted,
    PinHeld,
    Recognised,
    StepMoved,
    Suspended,
    Tick,
)
from router.traces.texts import Said, fresh
from router.traces.trace import PinWish
from tests.unit.router.test_traces import HOME, WORKER, Machine, key, left
from tracehaul.wire.ids import BlockHash, Generation, NodeId, TraceId


def test_what_is_decided_rests_on_the_tools_and_on_what_was_seen() -> None:
    m = Machine()
    for at in range(3):
        m.step("a", 10.0 * at, [*range(8 + at)], called=("bash",), agent="x")
    retained = [e.decision for e in m.trace("a").decisions if isinstance(e.decision, Retained)]
    assert [(decision.tools, decision.seen) for decision in retained] == [(("bash",), at) for at in range(3)]
    assert retained[2].situation.reload_s == pytest.approx(0.010)


def test_what_its_client_marked_is_pinned_for_longer() -> None:
    def pinned_s(keep_s: float) -> float:
        m = Machine()
        for at in range(50):
            m.step("a", 3.0 * at, [*range(8 + at)], called=("bash",), agent="x", keep_s=keep_s)
        retained = [e.decision for e in m.trace("a").decisions if isinstance(e.decision, Retained)]
        return retained[-1].retention.pin_s

    assert pinned_s(0.0) < 200.0
    assert pinned_s(300.0) == 305.0


def test_a_late_answer_counts_from_the_steps_end() -> None:
    m = Machine()
    for at in range(120):
        m.step("b", 100.0 * at, called=("slow",))
    step = m.begin("a", 0.0)
    m.place("a", step, 0.0)
    m.end("a", step, 1.0, left([*range(8)]))
    effects = m.answer("a", step, 21.0, tools=("slow",))
    recall_s = m.trace("a").retention.recall_s
    assert recall_s == pytest.approx(99.0, abs=0.2)
    assert [type(effect) for effect in effects if isinstance(effect, SetPin)] == [SetPin]
    assert m.traces.next_alarm_s == 1.0 + recall_s
    (back,) = m.send(Tick(), 1.0 + recall_s)
    assert isinstance(back, BringBack)
    assert (back.key, back.left.tokens, back.home, back.told) == (key("a"), 8, HOME, False)


def test_what_nothing_says_that_it_returns_is_not_called_back() -> None:
    def recall_s(steps: int, called: tuple[str, ...] = ()) -> float | None:
        m = Machine()
        for at in range(120):
            m.step("b", 100.0 * at, called=called)
        for at in range(steps):
            m.step("a", 10.0 * at, [*range(8 + at)], called=called)
        return m.trace("a").retention.recall_s

    assert recall_s(1) is None
    assert recall_s(2) is not None
    assert recall_s(1, ("bash",)) is not None


def test_answers_that_name_no_tools_are_not_taken_for_none() -> None:
    m = Machine()
    one, two = m.begin("a", 0.0, "1"), m.begin("a", 0.0, "2")
    m.answer("a", one, 1.0, tools=("bash",))
    m.answer("a", two, 1.0)
    assert m.trace("a").calls == ("bash",)


def test_a_context_that_is_continued_meanwhile_is_not_called_back() -> None:
    m = Machine()
    first = m.step("a", 0.0, [1, 2, 3, 4])
    m.step("a", 2.0, [1, 2, 3, 4, 5])
    again = Warm(NodeId("decode-9"), Generation(1), 4)
    m.send(ContextRecalled(key("a"), first, again, Recalled(again.node, "", 4, 4, 0.1)), 4.0)
    assert m.trace("a").lefts[-1].warm.node == WORKER


def test_deleting_frees_what_is_held_elsewhere_and_stops_what_runs() -> None:
    m = Machine()
    m.step("a", 0.0, [1, 2, 3, 4, 5])
    wish = PinWish("soft", 100.0, 8.0, 1, HOME, BlockHash(b"x" * 16))
    m.send(PinHeld(key("a"), wish), 2.0)
    step = m.begin("a", 3.0)
    effects = m.send(Deleted(key("a")), 4.0)
    assert effects[:2] == [StopSteps(key("a"), (step,)), StopRecall(key("a"))]
    ends = [effect.name for effect in effects if isinstance(effect, EndPin)]
    assert (ends, effects[-1]) == (["a~", "a"], FreeContext(key("a"), WORKER))
    for late in (m.end("a", step, 5.0, left([1])), m.answer("a", step, 5.0), m.send(Suspended(key("a"), 1, 2, "x"), 5)):
        assert late == []
    assert (len(m.traces), m.traces.nbytes, m.traces.next_alarm_s) == (0, 0, None)


def test_what_comes_late_does_not_touch_a_new_trace_of_that_name() -> None:
    m = Machine()
    old = m.begin("a", 0.0, "old")
    m.send(Deleted(key("a")), 1.0)
    m.begin("a", 2.0, "new")
    m.end("a", old, 3.0, left([1, 2, 3]))
    m.answer("a", old, 3.0, tools=("bash",), response="r")
    m.send(StepMoved(key("a"), Moved(old, WORKER, "lost", 0)), 3.0)
    m.place("a", old, 3.0)
    trace = m.trace("a")
    assert (trace.state, trace.context_tokens, trace.home, trace.decisions) == ("running", 0, None, [])
    assert m.traces.response("", "r") is None


def test_nothing_of_a_deleted_trace_stays_in_memory() -> None:
    m = Machine()
    m.step("other", 0.0)
    leaves, text = left([1, 2, 3, 4, 5]), "".join(["hel", "lo"])
    name, response, tool, digest = ("".join([word, "!"]) for word in ("name", "response", "tool", "d" * 15))
    things = [leaves, leaves.packed, text, name, response, tool]
    before = [sys.getrefcount(thing) for thing in things]

    def live() -> None:
        step = m.begin(name, 0.0)
        m.place(name, step, 0.0)
        m.end(name, step, 1.0, leaves)
        m.answer(name, step, 1.0, said=Said(fresh(text, [1, 2, 3], [])), response=response, tools=(tool,))
        m.send(Recognised(key(name), (b"1" * 16, digest.encode())), 2.0)
        m.send(Suspended(key(name), 50.0, 100.0, tool), 3.0)
        m.events.clear()

    live()
    kept = m.traces.nbytes
    assert all(now > then for now, then in zip([sys.getrefcount(thing) for thing in things], before, strict=True))
    m.send(Deleted(key(name)), 4.0)
    m.events.clear()
    gc.collect()
    assert [sys.getrefcount(thing) for thing in things] == before
    assert m.traces.nbytes < kept
    assert m.traces.texts([key(name)]) == []
    assert m.traces.response("", response) is None
    assert m.traces.place("", [b"1" * 16, digest.encode()], TraceId("new")).trace == "new"
    assert m.traces.next_alarm_s is None
