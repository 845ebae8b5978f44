"""Conversations without a name."""

from hypothesis import given
from hypothesis import strategies as st

from router.policy.retention import RetentionConfig
from router.traces.book import Book
from router.traces.events import Event, StepBegan, StepEnded
from router.traces.machine import Traces
from router.traces.prefixes import DIGESTS_MAX, Heard, Place, Sought, digests
from tracehaul.wire.ids import StepId, TraceId


class Agents:
    """Calls in words: a conversation is a string of one-letter messages; ``S`` is the system's."""

    def __init__(self, traces_max: int = 1000) -> None:
        self.traces = Traces(traces_max, 1 << 30, RetentionConfig())
        self.book = Book(self.traces, self)
        self.calls = 0

    def now_s(self) -> float:
        return float(self.calls)

    def send(self, event: Event) -> None:
        self.traces.handle(event, self.now_s())
        self.traces.check()

    def call(
        self, messages: str, salt: str = "", *, refused: bool = False, first: bool = False, answer: str | None = None
    ) -> Place:
        """One with one step. ``answer``: what is said; others go on from it with it, or with an ``A`` of another
        spelling where it is an ``a``."""
        self.calls += 1
        conversation = digests(salt, [message.encode() for message in messages])
        at = max(messages.rfind("a"), messages.rfind("A"))
        heard = Heard(at, f"{salt}|{messages[:at]}a") if at >= 0 and not first else None
        sought = Sought(conversation, messages.startswith("S"), first, heard)
        place = self.book.place(salt, sought, TraceId(f"t{self.calls}"))
        if not refused:
            key, step = (salt, place.trace), StepId(str(self.calls))
            self.send(StepBegan(key, step, place.parent, 1))
            self.send(StepEnded(key, step, "stop", 1, None, None, 0.0, False))
            name = None if answer is None else f"{salt}|{messages}{answer}"
            self.book.answered(salt, place.trace, step, response=None, heard=name)
        self.book.over(salt, place.trace)
        return place


def test_a_conversation_that_grows_is_one_trace() -> None:
    agents = Agents()
    assert agents.call("Su") == Place(TraceId("t1"))
    assert agents.call("Suat") == Place(TraceId("t1"))
    assert agents.call("Suatat") == Place(TraceId("t1"))
    assert agents.call("Suatat") == Place(TraceId("t1")), "a call made again"


def test_the_same_system_prompt_makes_no_trace() -> None:
    agents = Agents()
    assert agents.call("Su").trace == "t1"
    assert agents.call("Sv") == Place(TraceId("t2"))
    assert agents.call("S") == Place(TraceId("t3"))
    assert agents.call("S") == Place(TraceId("t4"))


def test_tenants_do_not_meet() -> None:
    agents = Agents()
    agents.call("Su")
    assert agents.call("Suat", salt="red") == Place(TraceId("t2"))


def test_children_at_once_are_one_continuation_and_forks() -> None:
    agents = Agents()
    agents.call("Sp")
    places = [agents.call("Spa" + name) for name in "123"]
    assert places == [Place(TraceId("t1")), Place(TraceId("t3"), TraceId("t1")), Place(TraceId("t4"), TraceId("t1"))]
    assert [agents.call(f"Spa{name}at").trace for name in "321"] == ["t4", "t3", "t1"], "each goes its own way"


def test_going_back_is_a_fork() -> None:
    agents = Agents()
    agents.call("u")
    agents.call("uatat")
    assert agents.call("uax") == Place(TraceId("t3"), TraceId("t1"))
    assert agents.call("uaxat") == Place(TraceId("t3"))
    assert agents.call("u") == Place(TraceId("t5"), TraceId("t1")), "its beginning again"
    assert agents.call("uz") == Place(TraceId("t5"))
    assert agents.call("uatatat") == Place(TraceId("t1"))


def test_what_begins_alike_is_not_the_same() -> None:
    agents = Agents()
    assert agents.call("Su", first=True, answer="b") == Place(TraceId("t1"))
    assert agents.call("Su", first=True, answer="a") == Place(TraceId("t2"), shared=True)
    assert agents.call("Su", first=True, answer="c") == Place(TraceId("t3"), shared=True)
    assert agents.call("SuAt") == Place(TraceId("t2")), "what was answered tells them apart"
    assert agents.call("SuAtax") == Place(TraceId("t2"))
    assert agents.call("Suxt") == Place(TraceId("t6"), TraceId("t3")), "by the beginning alone nobody is found"
    assert agents.call("Su", first=True) == Place(TraceId("t7"), shared=True)
    assert agents.call("Sv", first=True) == Place(TraceId("t8"))


def test_of_those_who_gave_an_answer_the_last_one_goes_on() -> None:
    agents = Agents()
    for _ in "12":
        agents.call("Su", first=True, answer="a")
    assert agents.call("SuAt") == Place(TraceId("t2"))
    assert agents.call("SuAx") == Place(TraceId("t4"), TraceId("t2"))


def test_an_answer_is_gone_on_from_once() -> None:
    agents = Agents()
    agents.call("Su", first=True, answer="a")
    assert agents.call("SuAt") == Place(TraceId("t1"))
    assert agents.call("SuAx") == Place(TraceId("t3"), TraceId("t1")), "the others are forks"
    assert agents.call("SuAt") == Place(TraceId("t1")), "a call made again"
    assert agents.call("SuAt", salt="red") == Place(TraceId("t5"))


def test_an_answer_is_forgotten_with_its_trace() -> None:
    agents = Agents(traces_max=1)
    agents.call("Su", first=True, answer="a")
    agents.call("Sv", first=True)
    assert agents.call("SuAt") == Place(TraceId("t3"))


def test_what_is_old_is_forgotten() -> None:
    agents = Agents(traces_max=2)
    agents.call("abcd")
    agents.call("xyz")
    assert agents.call("abcde").trace == "t1"
    assert agents.call("12345").trace == "t4"
    assert agents.call("xyz!") == Place(TraceId("t5")), "of the least recently used nothing is left"


def test_a_refused_call_leaves_nothing_behind() -> None:
    agents = Agents()
    agents.call("Su", refused=True)
    assert (len(agents.traces), agents.traces.nbytes) == (0, 0)
    assert agents.call("Su") == Place(TraceId("t2"))
    assert agents.call("Suat", refused=True) == Place(TraceId("t2"))
    assert len(agents.traces) == 1


def test_calls_at_once_are_told_apart_before_their_steps_begin() -> None:
    agents = Agents()
    agents.call("Sp")
    conversations = [digests("", [m.encode() for m in f"Spa{name}"]) for name in "12"]
    one, two = (agents.book.place("", Sought(c, 1), TraceId(f"u{at}")) for at, c in enumerate(conversations))
    assert (one, two) == (Place(TraceId("t1")), Place(TraceId("u1"), TraceId("t1")))
    assert [trace.trace for trace in agents.traces.all()] == ["t1"], "what has no step yet is not shown"


def test_a_forked_trace_is_found_when_its_parent_is_forgotten() -> None:
    agents = Agents(traces_max=2)
    agents.call("uat")
    assert agents.call("uax") == Place(TraceId("t2"), TraceId("t1"))
    agents.call("other")
    assert agents.call("uaxat") == Place(TraceId("t2"))
    assert agents.call("uaxatat") == Place(TraceId("t2"))


def test_of_a_long_conversation_the_longest_beginnings_count() -> None:
    agents = Agents()
    long = "u" * (DIGESTS_MAX + 50)
    agents.call(long)
    assert agents.call(long + "at") == Place(TraceId("t1"))
    trace = agents.traces.get(("", TraceId("t1")))
    assert trace is not None
    assert len(trace.digests) == DIGESTS_MAX


@given(st.lists(st.text("ab", max_size=6), max_size=30), st.integers(1, 12))
def test_a_longer_conversation_never_loses_its_trace_while_it_is_known(calls: list[str], traces_max: int) -> None:
    agents = Agents(traces_max)
    for messages in calls:
        place = agents.call(messages)
        if messages:
            something_new = chr(1000 + agents.calls)
            assert agents.call(messages + something_new).trace == place.trace
