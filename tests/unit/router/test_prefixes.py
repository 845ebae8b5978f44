"""Conversations without a name."""

from hypothesis import given
from hypothesis import strategies as st

from router.traces.prefixes import Place, Prefixes, digests
from tracehaul.wire.ids import TraceId


class Agents:
    """Calls in words: a conversation is a string of one-letter messages; ``S`` is the system's."""

    def __init__(self, messages_max: int = 1000) -> None:
        self.prefixes = Prefixes(messages_max)
        self.calls = 0

    def call(self, messages: str, salt: str = "") -> Place:
        self.calls += 1
        conversation = digests(salt, [message.encode() for message in messages])
        place = self.prefixes.place(conversation, messages.startswith("S"), TraceId(f"t{self.calls}"))
        self.prefixes.check()
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


def test_what_is_old_is_forgotten() -> None:
    agents = Agents(messages_max=4)
    agents.call("abcd")
    agents.call("xyz")
    assert agents.call("abcde").trace == "t1", "its end is still known"
    agents.call("123456789")
    assert agents.call("abcdef") == Place(TraceId("t5"))


@given(st.lists(st.text("ab", max_size=6), max_size=30), st.integers(1, 12))
def test_a_longer_conversation_never_loses_its_trace_while_it_is_known(calls: list[str], messages_max: int) -> None:
    agents = Agents(messages_max)
    for messages in calls:
        place = agents.call(messages)
        if messages and len(messages) < messages_max:
            something_new = chr(1000 + agents.calls)
            assert agents.call(messages + something_new).trace == place.trace
