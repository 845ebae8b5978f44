"""The traces' events, written down and handled again."""

import msgspec
import numpy as np
import pytest

from router.dispatch.config import DispatchConfig
from router.fleet.load import Warm
from router.http.config import ApiConfig
from router.policy.gaps import Gaps
from router.policy.prices import Bill
from router.policy.retention import RetentionConfig
from router.traces.alarms import Alarms
from router.traces.asks import Ask, Begun
from router.traces.decisions import Moved, Recalled
from router.traces.effects import Effect
from router.traces.events import (
    Answered,
    CallOver,
    Charged,
    ContextRecalled,
    Deleted,
    Elsewhere,
    Event,
    PinAsked,
    PinHeld,
    Recognised,
    Resumed,
    StepBegan,
    StepEnded,
    StepGrew,
    StepMoved,
    Suspended,
    Tick,
)
from router.traces.hits import Hits
from router.traces.lookups import Lookups
from router.traces.machine import Traces
from router.traces.texts import Said, fresh
from router.traces.trace import PinWish
from router.traces.uses import Uses
from tests.unit.router.test_traces import HOME, WORKER, Machine, key, left
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import BlockHash, Generation, StepId
from tracehaul.wire.spent import Spent


def test_events_are_plain_data_that_give_the_same_traces_again() -> None:
    m = Machine(traces_max=4, bytes_max=100_000)
    said = Said(fresh("hello", [1, 2, 3], [(2, 1)]), "xy", pack_tokens([4, 5]))
    for at, name in enumerate("abcdeab"):
        s = m.begin(name, 10.0 * at, parent="a", tools=("bash",), agent="x", prompt_tokens=3)
        m.place(name, s, 10.0 * at, continues=s, takes=True)
        m.send(StepMoved(key(name), Moved(s, WORKER, "peer_lost", 1)), 10.0 * at)
        m.end(name, s, 10.0 * at + 1, left([*range(9)], s, Warm(WORKER, Generation(1), 9)), hits=Hits(losses={"x": 1}))
        m.answer(name, s, 10.0 * at + 1, tools=("bash",), said=said, response=f"r{at}")
        m.send(Recognised(key(name), (name.encode() * 16, b"z" * 16)), 10.0 * at + 1)
    m.send(CallOver(key("b")), 70.0)
    asked = StepId("asked")
    m.send(StepBegan(key("b"), asked, None, 3, ask=Ask(b"name", asked, 7, 70.0)), 70.0)
    m.send(StepGrew(key("b"), asked, pack_tokens([1])), 70.2)
    begun = Begun(pack_tokens([1, 2]))
    m.send(StepEnded(key("b"), asked, "aborted", 2, None, None, 0.0, final=False, begun=begun), 70.4)
    m.send(Answered(key("b"), asked), 70.4)
    m.send(Suspended(key("b"), 5.0, 500.0, None), 71.0)
    m.send(PinAsked(key("b"), 9.0, PinWish("hard", 80.0, 2.0, 1)), 71.0)
    m.send(PinHeld(key("b"), PinWish("hard", 80.0, 2.0, 1, HOME, BlockHash(b"1" * 16))), 72.0)
    m.send(Tick(), 76.0)
    m.send(
        ContextRecalled(key("b"), StepId("b-60.0"), Warm(WORKER, Generation(2), 5), Recalled(WORKER, "", 1, 5, 0.1)),
        77.0,
    )
    m.send(Resumed(key("b")), 78.0)
    m.send(Charged(key("b"), Bill(Spent(prefill_s=1.0), 2.0, 3.0)), 79.0)
    m.send(Elsewhere(key("c")), 79.0)
    m.send(Deleted(key("a")), 79.0)
    assert {type(event) for _, event in m.events} == set(Event.__args__)
    journal = [msgspec.msgpack.encode(entry) for entry in m.events]
    again = Traces(4, 100_000, RetentionConfig())
    for line in journal:
        at_s, event = msgspec.msgpack.decode(line, type=tuple[float, Event])
        effects = again.handle(event, at_s)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(effects), type=list[Effect]) == effects
    again.check()
    assert list(again.all()) == list(m.traces.all())
    assert state(again) == state(m.traces)
    assert state(again) != state(Machine(4, 100_000).traces)


def state(part: object) -> object:
    """All that a machine or a part of it knows, in its order, down to what was learned of pauses."""
    if isinstance(part, (Traces, Uses, Alarms, Lookups, Gaps)):
        return {name: state(value) for name, value in vars(part).items() if name != "_between"}
    if isinstance(part, np.ndarray):
        return part.tolist()
    return list(part.items()) if isinstance(part, dict) else part


def test_limits_that_are_gone_are_refused() -> None:
    for name in ("contexts_bytes_max", "decisions_max"):
        with pytest.raises(msgspec.ValidationError, match=name):
            msgspec.convert({name: 5}, DispatchConfig)
    for name in ("traces_max", "texts_bytes_max", "messages_max"):
        with pytest.raises(msgspec.ValidationError, match=name):
            msgspec.convert({name: 5}, ApiConfig)
