"""What of a trace may be asked again."""

import pytest

from router.dispatch.again import grown_s
from router.policy.retention import RetentionConfig
from router.traces.asks import ASKS_BYTES_MAX, ASKS_MAX, Ask, Begun, answered, asked, ended, find, grown, size
from router.traces.events import Answered, StepBegan, StepEnded, StepGrew
from router.traces.machine import Traces
from router.traces.trace import TraceKey
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import StepId, TraceId

KEY: TraceKey = ("", TraceId("t"))
NAME = b"name"


def ask(step: str = "s", name: bytes = NAME, **more: object) -> Ask:
    return Ask(name, StepId(step), 7, 0.0, **more)  # pyright: ignore[reportArgumentType] - what a test says


def life() -> Traces:
    traces = Traces(10, 1 << 20, RetentionConfig())
    traces.handle(StepBegan(KEY, StepId("s"), None, 10, ask=ask()), 0.0)
    return traces


def asks(traces: Traces) -> tuple[Ask, ...]:
    trace = traces.get(KEY)
    assert trace is not None
    traces.check()
    return trace.asks


def over(traces: Traces, ending: str, begun: Begun | None, *, done: bool) -> None:
    traces.handle(StepEnded(KEY, StepId("s"), ending, 2, None, None, 0.0, final=False, begun=begun), 1.0)
    traces.handle(Answered(KEY, StepId("s"), done=done), 1.0)


def test_a_step_whose_client_left_is_found_with_its_tokens_and_seed() -> None:
    traces = life()
    assert find(asks(traces), NAME, 0.0) is None, "it runs: it is somebody's"
    begun = Begun(pack_tokens([1, 2]))
    over(traces, "aborted", begun, done=False)
    found = find(asks(traces), NAME, 0.0)
    assert found is not None
    assert (found.seed, found.begun, found.runs) == (7, begun, False)
    assert find(asks(traces), b"other", 0.0) is None
    assert find(asks(traces), NAME, 1.5) is None, "it is too long ago"


def test_a_step_that_was_answered_is_not_to_be_asked_again_unless_it_is_named() -> None:
    traces = life()
    over(traces, "stop", Begun(pack_tokens([1, 2]), "stop"), done=True)
    assert asks(traces) == ()
    named = ended((ask(keyed=True),), StepId("s"), Begun(pack_tokens([1]), "stop"), 1.0)
    assert find(answered(named, StepId("s")), NAME, 0.0) is not None


def test_what_was_told_of_a_step_survives_an_end_that_nobody_saw() -> None:
    traces = life()
    traces.handle(StepGrew(KEY, StepId("s"), pack_tokens([1, 2, 3])), 1.0)
    over(traces, "router_lost", None, done=False)
    found = find(asks(traces), NAME, 0.0)
    assert found is not None
    assert found.begun == Begun(pack_tokens([1, 2, 3]))


def test_asked_again_it_takes_the_place_of_what_was_known_but_not_of_what_runs() -> None:
    first = ended((ask("a"),), StepId("a"), Begun(b"\1\0\0\0"), 1.0)
    again = asked(first, ask("b", begun=first[0].begun))
    assert [one.step for one in again] == ["b"]
    assert [one.step for one in asked(again, ask("c"))] == ["b", "c"]
    assert asked(again, None) == again


def test_there_are_not_too_many_nor_too_long_ones_and_what_runs_stays() -> None:
    known: tuple[Ask, ...] = (ask("runs", b"runs"),)
    for at in range(2 * ASKS_MAX):
        name = str(at).encode()
        known = ended(asked(known, ask(str(at), name)), StepId(str(at)), Begun(), 1.0)
        assert len(known) <= ASKS_MAX
    assert known[0].step == "runs"
    long = ended(asked(known, ask("long", b"long")), StepId("long"), Begun(bytes(ASKS_BYTES_MAX + 4)), 2.0)
    assert [one.step for one in long] == ["runs", "long"]
    assert size(grown(long, StepId("runs"), bytes(8), 3.0)) - size(long) == 8


@pytest.mark.parametrize(("steps", "seconds"), [(1, 0.05), (8, 0.05), (50, 0.25), (10_000, 0.5)])
def test_tokens_of_few_steps_are_told_of_often(steps: int, seconds: float) -> None:
    assert grown_s(steps) == seconds
