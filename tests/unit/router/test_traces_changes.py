"""Traces, written down change by change and read again."""

import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import invariant

from router.policy.retention import RetentionConfig
from router.traces.asks import Ask
from router.traces.changes import Clock, Read, Unreadable, read, retimed, written
from router.traces.events import StepBegan, StepGrew
from router.traces.machine import Traces
from router.traces.revival import ROUTER_LOST, lost, revived
from router.traces.texts import Said, fresh
from router.traces.trace import PinWish, Trace, TraceKey, with_kept
from tests.unit.router.test_traces import HOME, Machine, key, left
from tests.unit.router.test_traces_model import BYTES_MAX, TRACES_MAX, Model
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import StepId

CLOCK = Clock("boot", 100.0, 5000.0)
EDITIONS = {"m": "one"}


class Writer:
    """Writes what changes, and reads it again: ``found`` is all that a next life knows."""

    def __init__(self, traces: Traces) -> None:
        self.traces = traces
        traces.changed = {}
        self.found: dict[TraceKey, Read] = {}
        self.sizes: list[int] = []
        self._before: dict[TraceKey, Trace] = {}
        self._number = 0

    def write(self, clock: Clock = CLOCK) -> None:
        assert self.traces.changed is not None
        for name in list(self.traces.changed):
            trace = self.traces.get(name)
            if trace is None:
                self._before.pop(name, None)
                self.found.pop(name, None)
                continue
            self._number += 1
            before, was = self._before.get(name), self.found.get(name)
            planned = tuple((alarm.at_s, alarm.kind) for alarm in self.traces.planned(name))
            body = written(before, was.number if was else 0, trace, planned, clock, EDITIONS)
            self.sizes.append(len(body))
            self.found[name] = read(name, was, self._number, body)
            self._before[name] = trace
        self.traces.changed.clear()


class Written(Model):
    """All that may happen to traces, in any order: what is read is what is so."""

    def __init__(self) -> None:
        super().__init__()
        self.writer = Writer(self.traces)

    @invariant()
    def it_is_written(self) -> None:
        if not hasattr(self, "writer"):
            return
        self.writer.write(Clock("boot", self.now_s, 0.0))
        live = {trace.key: trace for trace in self.traces.all()}
        assert {name: found.trace for name, found in self.writer.found.items()} == live

    def teardown(self) -> None:
        now = Clock("boot", self.now_s, 0.0)
        again = Traces(TRACES_MAX, 2 * BYTES_MAX, RetentionConfig())
        for trace, alarms in revived(self.writer.found, (), 1e9, now, EDITIONS):
            again.restore(trace, alarms)
            for event in lost(trace):
                again.handle(event, self.now_s)
        again.check()
        assert {trace.key for trace in again.all()} == {trace.key for trace in self.traces.all()}
        for trace in self.traces.all():
            other = again.get(trace.key)
            assert other is not None
            if not other.ended:
                assert (other.lefts, other.texts, other.pin) == (trace.lefts, trace.texts, trace.pin)
            assert other.responses == trace.responses
            assert not other.running
            if not trace.running and not trace.unanswered and not trace.calls_open:
                assert (
                    msgspec.structs.replace(other, children=trace.children, digests=trace.digests, tip=trace.tip)
                    == trace
                )


Written.TestCase.settings = settings(max_examples=15, stateful_step_count=40, deadline=None)
test_what_is_read_is_what_was = Written.TestCase


def story(steps: int, tokens: int) -> tuple[Machine, Writer]:
    """A trace whose context grows by so many tokens a step."""
    m = Machine(traces_max=4, bytes_max=1 << 24)
    writer = Writer(m.traces)
    ids: list[int] = []
    for at in range(steps):
        step = m.begin("a", 10.0 * at, prompt_tokens=len(ids))
        m.place("a", step, 10.0 * at)
        ids += range(at * tokens, (at + 1) * tokens)
        m.end("a", step, 10.0 * at + 1, left(ids, step))
        said = Said(fresh("x" * 3 * len(ids), ids), "", pack_tokens([7]), model="m")
        m.answer("a", step, 10.0 * at + 1, said=said, response=f"r{at}")
        writer.write()
    return m, writer


def test_only_what_is_new_is_written() -> None:
    _, writer = story(steps=12, tokens=1000)
    # A thousand tokens in four bytes, three thousand characters, some hashes, a few rows.
    assert max(writer.sizes[1:]) < 1000 * (4 + 3) + 6000
    assert writer.sizes[-1] < 1.5 * writer.sizes[1]


def test_a_change_that_follows_another_one_is_refused() -> None:
    _, writer = story(steps=2, tokens=8)
    trace = writer.found[key("a")].trace
    body = written(trace, 7, trace, (), CLOCK, EDITIONS)
    for before in (None, writer.found[key("a")]):
        with pytest.raises(Unreadable, match="missing"):
            read(key("a"), before, 9, body)
    with pytest.raises(Unreadable):
        read(key("a"), None, 9, body[:-3])
    values = msgspec.msgpack.decode(body)
    values[4][0][0] = 99  # continues a run of tokens that is not there
    with pytest.raises(Unreadable, match="range"):
        read(key("a"), writer.found[key("a")]._replace(number=7), 9, msgspec.msgpack.encode(values))


def test_a_step_that_ran_when_the_router_ended_is_told_as_such() -> None:
    m, writer = story(steps=2, tokens=8)
    step = m.begin("a", 50.0)
    m.place("a", step, 50.0)
    writer.write()
    again = Traces(4, 1 << 24, RetentionConfig())
    [(trace, alarms)] = revived(writer.found, (), 1e9, CLOCK, EDITIONS)
    again.restore(trace, alarms)
    for event in lost(trace):
        again.handle(event, 100.0)
    again.check()
    known = again.get(key("a"))
    assert known is not None
    assert [one.ending for one in known.steps] == ["stop", "stop", ROUTER_LOST]
    assert known.state == "acting"
    assert known.lefts == trace.lefts != ()
    assert again.response("", "r1") == "a"


@pytest.mark.parametrize(("wall_s", "passed_s"), [(5060.0, 60.0), (5000.0 - 3600, 0.0)], ids=["later", "put back"])
def test_times_hold_in_another_run_of_the_machine(wall_s: float, passed_s: float) -> None:
    m, _ = story(steps=2, tokens=8)
    known = m.traces.get(key("a"))
    assert known is not None
    known = msgspec.structs.replace(known, pin=PinWish("hard", 400.0, 1.0, 1, HOME))
    now = Clock("another", 3.0, wall_s)
    by_s = 3.0 - passed_s - 100.0
    moved, [(at_s, _)] = retimed(known, ((130.0, "recall"),), CLOCK, now)
    assert at_s == pytest.approx(130.0 + by_s)
    assert moved.pin is not None
    assert moved.pin.until_s == pytest.approx(400.0 + by_s)
    assert [step.began_s for step in moved.steps] == pytest.approx([step.began_s + by_s for step in known.steps])
    assert [e.at_s for e in moved.decisions] == pytest.approx([e.at_s + by_s for e in known.decisions])
    assert [e.decision for e in moved.decisions] == [e.decision for e in known.decisions]
    assert with_kept(moved, known.lefts, known.texts) == moved
    assert retimed(known, (), CLOCK, Clock("boot", 100.0, wall_s))[0] is known


def test_what_has_rested_too_long_does_not_live_on() -> None:
    _, writer = story(steps=2, tokens=8)
    now = Clock("boot", 100.0 + 50, 0.0)
    assert [trace.key for trace, _ in revived(writer.found, (), 51.0, now, EDITIONS)] == [key("a")]
    assert list(revived(writer.found, (), 49.0, now, EDITIONS)) == []
    assert list(revived(writer.found, {key("a")}, 51.0, now, EDITIONS)) == []


def test_texts_of_another_edition_of_the_model_do_not_live_on() -> None:
    _, writer = story(steps=2, tokens=8)
    [(trace, _)] = revived(writer.found, (), 1e9, CLOCK, EDITIONS)
    assert trace.texts
    for now in ({"m": "two"}, {}):
        [(other, _)] = revived(writer.found, (), 1e9, CLOCK, now)
        assert other == with_kept(trace, trace.lefts, ())


def test_what_was_written_without_editions_is_read() -> None:
    m, _ = story(steps=1, tokens=8)
    known = m.traces.get(key("a"))
    assert known is not None
    values = msgspec.msgpack.decode(written(None, 0, known, (), CLOCK, EDITIONS))
    assert values.pop() == []  # what may be asked again
    assert read(key("a"), None, 1, msgspec.msgpack.encode(values)).trace == known
    again = read(key("a"), None, 1, msgspec.msgpack.encode(values[:-1]))
    assert (again.trace, again.editions) == (known, {})


def test_what_may_be_asked_again_is_written_by_what_is_new_of_it_and_lives_on_as_far_as_it_was() -> None:
    m, _ = story(steps=1, tokens=8)
    step = StepId("asked")
    m.send(StepBegan(key("a"), step, None, 3, ask=Ask(b"name", step, 7, 50.0)), 50.0)
    tokens = bytes(4000)
    m.send(StepGrew(key("a"), step, tokens), 51.0)
    known = m.traces.get(key("a"))
    assert known is not None
    m.send(StepGrew(key("a"), step, tokens + bytes(4)), 52.0)
    grown = m.traces.get(key("a"))
    assert grown is not None
    first = written(None, 0, known, (), CLOCK, EDITIONS)
    more = written(known, 1, grown, (), CLOCK, EDITIONS)
    assert len(more) < len(first) - len(tokens)
    again = read(key("a"), read(key("a"), None, 1, first), 2, more)
    assert again.trace == grown
    [(alive, _)] = revived({key("a"): again}, (), 1e9, Clock("other", 7.0, CLOCK.wall_s + 10.0), EDITIONS)
    (ask,) = alive.asks
    assert (ask.runs, ask.begun.packed, ask.seed) == (True, tokens + bytes(4), 7)
    assert ask.at_s == pytest.approx(52.0 - CLOCK.now_s + 7.0 - 10.0)
