"""The traces as one state machine, and what their steps leave."""

import gc
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.dispatch.dispatch import DispatchConfig
from router.fleet.load import Warm
from router.http.config import ApiConfig
from router.policy.gaps import Gaps
from router.policy.retention import RetentionConfig
from router.traces.alarms import Alarms
from router.traces.contexts import LEAVES_MAX, Left, cut, grow, joined, listed
from router.traces.decisions import DECISIONS_MAX, Asked, Ended, Moved, Placed, Recalled, Replaced, Retained
from router.traces.effects import BringBack, Effect, EndPin, FreeContext, SetPin, StopRecall, StopSteps, Told
from router.traces.events import (
    Answered,
    CallOver,
    ContextRecalled,
    Deleted,
    Event,
    PinAsked,
    PinHeld,
    Recognised,
    Resumed,
    StepBegan,
    StepEnded,
    StepMoved,
    StepPlaced,
    Suspended,
    Tick,
)
from router.traces.hits import Hits
from router.traces.lookups import Lookups
from router.traces.machine import Traces
from router.traces.texts import CutTokens, Said, fresh
from router.traces.trace import OTHER_TOOLS, RESPONSES_MAX, STEPS_MAX, TOOLS_MAX, PinWish, Trace, TraceKey
from tracehaul.wire.hashing import chain, pack_tokens
from tracehaul.wire.ids import BlockHash, Generation, NodeId, StepId, TraceId

ROOT = BlockHash(b"r" * 16)
BLOCK = 4
CONFIG = RetentionConfig()
HOME, WORKER = NodeId("store-1"), NodeId("decode-0")


def key(name: str, salt: str = "") -> TraceKey:
    return salt, TraceId(name)


def left(tokens: list[int], step: str = "s", warm: Warm | None = None, root: BlockHash = ROOT) -> Left:
    packed = pack_tokens(tokens)
    return Left(StepId(step), root, BLOCK, packed, joined(chain(root, packed, BLOCK)), len(tokens), warm)


class Machine:
    """The traces, checked after each event."""

    def __init__(self, traces_max: int = 10, bytes_max: int = 1 << 20, config: RetentionConfig = CONFIG) -> None:
        self.traces = Traces(traces_max, bytes_max, config)
        self.events: list[tuple[float, Event]] = []

    def send(self, event: Event, at_s: float) -> list[Effect]:
        self.events.append((at_s, event))
        effects = self.traces.handle(event, at_s)
        self.traces.check()
        return [effect for effect in effects if not isinstance(effect, Told)]

    def trace(self, name: str) -> Trace:
        trace = self.traces.get(key(name))
        assert trace is not None
        return trace

    def begin(self, name: str, at_s: float, step: str = "", *, parent: str | None = None, **fields) -> StepId:
        made = StepId(step or f"{name}-{at_s}")
        origin = None if parent is None else TraceId(parent)
        self.send(StepBegan(key(name), made, origin, fields.pop("prompt_tokens", 0), **fields), at_s)
        return made

    def place(self, name: str, step: StepId, at_s: float, **fields) -> None:
        decision = Placed(step, WORKER, "", 0, 0, None, 0, 0, NodeId("prefill-0"), HOME, {})
        self.send(StepPlaced(key(name), decision, fields.get("continues"), fields.get("takes", False)), at_s)

    def end(self, name: str, step: StepId, at_s: float, leaves: Left | None = None, **fields) -> list[Effect]:
        event = StepEnded(key(name), step, fields.get("ending", "stop"), fields.get("output_tokens", 0),
                          fields.get("hits"), leaves, 1e-3, fields.get("final", False))  # fmt: skip
        return self.send(event, at_s)

    def answer(self, name: str, step: StepId, at_s: float, **fields) -> list[Effect]:
        return self.send(Answered(key(name), step, **fields), at_s)

    def step(self, name: str, at_s: float, tokens: list[int] | None = None, **fields) -> StepId:
        """One that takes a second, and is placed if it leaves something."""
        tools = fields.pop("called", None)
        step = self.begin(name, at_s, **fields)
        if tokens is not None:
            self.place(name, step, at_s)
        warm = Warm(WORKER, Generation(1), len(tokens)) if tokens else None
        self.end(name, step, at_s + 1.0, None if tokens is None else left(tokens, step, warm))
        self.answer(name, step, at_s + 1.0, tools=tools)
        return step


@given(st.lists(st.integers(0, 2)), st.lists(st.lists(st.integers(0, 2)), max_size=4))
def test_a_prompt_is_cut_as_if_nothing_were_known(prompt: list[int], before: list[list[int]]) -> None:
    packed = pack_tokens(prompt)
    found = cut(ROOT, packed, BLOCK, [left(tokens, str(at)) for at, tokens in enumerate(before)])
    assert list(found.hashes) == chain(ROOT, packed, BLOCK)
    shared = [
        next((i for i, (a, b) in enumerate(zip(prompt, tokens, strict=False)) if a != b), min(len(prompt), len(tokens)))
        for tokens in before
    ]
    assert found.shared_tokens == max(shared, default=0)
    if found.left is not None:
        assert int(found.left.step) == max(i for i, n in enumerate(shared) if n == found.shared_tokens)


def test_contexts_of_another_model_or_tenant_are_not_continued() -> None:
    assert cut(ROOT, pack_tokens([1, 2, 3, 4]), BLOCK, [left([1, 2, 3, 4], root=BlockHash(b"x" * 16))]).left is None


def test_a_context_takes_the_place_of_what_it_continues() -> None:
    one, two = left([1, 2]), left([1, 9])
    assert grow([one, two], left([1, 2, 3])) == (two, left([1, 2, 3]))
    many = [left([n]) for n in range(LEAVES_MAX)]
    assert grow(many, left([99])) == (*many[1:], left([99]))


@given(st.lists(st.binary(min_size=16, max_size=16)))
def test_hashes_are_joined_and_listed(hashes: list[bytes]) -> None:
    assert listed(joined(map(BlockHash, hashes))) == hashes


def test_a_traces_life() -> None:
    m = Machine()
    first = m.begin("a", 10.0, prompt_tokens=7, agent="x")
    trace = m.trace("a")
    assert (trace.state, trace.steps[0].pause, trace.steps[0].parent) == ("running", None, None)
    assert (trace.steps[0].ending, trace.steps[0].ended_s) == ("running", None)
    m.end("a", first, 12.0, left([1, 2, 3]), output_tokens=5, hits=Hits(delivered=2))
    m.answer("a", first, 12.0, tools=("bash",))
    trace = m.trace("a")
    assert (trace.state, trace.context_tokens, trace.idle_since_s) == ("acting", 3, 12.0)
    second = m.begin("a", 15.0)
    trace = m.trace("a")
    done, begun = trace.steps
    assert (done.ending, done.ended_s, done.output_tokens, done.hits) == ("stop", 12.0, 5, Hits(delivered=2))
    assert begun.pause is not None
    assert (begun.pause.tools, begun.pause.seconds, begun.parent) == (("bash",), 3.0, first)
    assert (trace.tools["bash"].uses, trace.tools["bash"].seconds, trace.agent) == (1, 3.0, "x")
    m.end("a", second, 16.0, final=True)
    trace = m.trace("a")
    assert (trace.state, trace.context_tokens, trace.lefts) == ("ended", 0, ())
    assert (trace.service.tokens_computed, trace.service.tokens_decoded, trace.service.seconds) == (5, 5, 3.0)


def test_nobody_changes_a_trace_from_outside() -> None:
    m = Machine()
    m.step("a", 0.0, [1, 2, 3], called=("bash",))
    m.begin("a", 5.0)
    trace = m.trace("a")
    with pytest.raises(AttributeError):
        trace.home = HOME
    with pytest.raises(AttributeError):
        trace.running[0].decode = WORKER
    with pytest.raises(TypeError):
        trace.tools["bash"] = trace.tools["bash"]
    m.step("a", 9.0)
    assert trace.steps_count == 2, "who looked sees what was then"


def test_the_prompt_knows_best_what_ran_before() -> None:
    m = Machine()
    m.step("a", 0.0, called=("bash",))
    m.step("a", 5.0, tools=("bash", "grep"))
    trace = m.trace("a")
    assert trace.steps[1].pause is not None
    assert trace.steps[1].pause.tools == ("bash", "grep")
    assert trace.tools["grep"].longest_s == 4.0


def test_a_step_beside_another_has_no_pause() -> None:
    m = Machine()
    first, second = m.begin("a", 0.0), m.begin("a", 1.0)
    assert m.trace("a").steps[1].pause is None
    m.end("a", second, 2.0)
    assert m.trace("a").state == "running"
    m.end("a", first, 3.0)
    assert m.trace("a").idle_since_s == 3.0
    assert [step.step for step in m.trace("a").steps] == [first, second], "as they began"


def test_a_fork_starts_at_its_parents_places() -> None:
    m = Machine()
    last = m.step("a", 0.0, [1, 2, 3])
    begun = m.begin("b", 2.0, parent="a")
    child = m.trace("b")
    assert (child.home, child.steps[0].parent, m.trace("a").children) == (HOME, last, ("b",))
    assert m.traces.lefts(key("b")) == (m.trace("a").lefts, ())
    m.place("b", begun, 2.0, continues=last, takes=True)
    assert m.trace("a").lefts[0].warm is None, "the worker has it under the child's name now"
    m.begin("c", 2.0, parent="c")
    assert m.trace("c").parent is None, "nobody is its own parent"
    m.send(Deleted(key("b")), 3.0)
    assert m.trace("a").children == ()


def test_tenants_do_not_meet() -> None:
    m = Machine()
    m.step("a", 0.0)
    m.send(StepBegan(key("a", "red"), StepId("1"), TraceId("b"), 0), 1.0)
    assert len(m.traces) == 2
    assert [trace.key for trace in m.traces.of("red")] == [("red", "a")]


def test_traces_are_bounded_and_running_ones_stay() -> None:
    m = Machine(traces_max=2)
    m.begin("a", 0.0)
    m.step("b", 1.0, parent="a")
    m.step("c", 2.0)
    assert m.traces.get(key("b")) is None
    assert m.trace("a").children == ()


def test_bytes_are_bounded_and_the_least_recently_used_go_whole() -> None:
    m = Machine()
    for at, name in enumerate("abcd"):
        m.step(name, float(at), [at] * 5000)
    each = m.trace("a").nbytes
    assert 40_000 < each < 43_000
    m = Machine(bytes_max=3 * each + 5000)
    for at, name in enumerate("abcdbe"):
        m.step(name, 10.0 * at, [ord(name)] * 5000)
        assert m.traces.nbytes <= 3 * each + 5000
    assert [trace.trace for trace in m.traces.of("")] == ["e", "b", "d"]


def test_one_that_fills_all_the_memory_alone_does_not_stay_when_it_is_idle() -> None:
    m = Machine(bytes_max=5000)
    m.step("a", 0.0)
    step = m.begin("b", 1.0)
    m.end("b", step, 2.0, left([1] * 5000))
    assert (len(m.traces), m.traces.nbytes) == (0, 0)
    assert m.answer("b", step, 2.0) == []


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
    assert m.traces.known([key(name)], "hello", CutTokens({})).text == ""
    assert m.traces.response("", response) is None
    assert m.traces.place("", [b"1" * 16, digest.encode()], TraceId("new")).trace == "new"
    assert m.traces.next_alarm_s is None


def test_pages_are_the_last_used_first() -> None:
    m = Machine()
    for name in "abc":
        m.step(name, 0.0)
    page = m.traces.page("", 2, None)
    assert page is not None
    assert ([trace.trace for trace in page[0]], page[1]) == (["c", "b"], True)
    page = m.traces.page("", 2, TraceId("b"))
    assert page is not None
    assert ([trace.trace for trace in page[0]], page[1]) == (["a"], False)
    assert m.traces.page("", 2, TraceId("nobody")) is None


def test_what_one_trace_may_fill_is_bounded() -> None:
    m = Machine()
    for at in range(STEPS_MAX + TOOLS_MAX):
        step = m.begin("a", 10.0 * at, tools=(f"tool-{at}",))
        m.end("a", step, 10.0 * at + 1.0)
        m.answer("a", step, 10.0 * at + 1.0, response=f"r{at}")
    trace = m.trace("a")
    assert (len(trace.steps), trace.steps_count) == (STEPS_MAX, STEPS_MAX + TOOLS_MAX)
    assert [step.began_s for step in trace.steps] == [10.0 * (TOOLS_MAX + at) for at in range(STEPS_MAX)]
    assert len(trace.tools) == TOOLS_MAX + 1
    assert trace.tools[OTHER_TOOLS].uses == STEPS_MAX - 1
    assert trace.responses == tuple(f"r{STEPS_MAX + TOOLS_MAX - n}" for n in range(RESPONSES_MAX, 0, -1))
    assert m.traces.response("", "r0") is None
    assert m.traces.response("", trace.responses[0]) == "a"
    for at in range(DECISIONS_MAX + 5):
        m.send(Resumed(key("a")), 1e4 + at)
    assert [entry.at_s for entry in m.trace("a").decisions] == [1e4 + 5 + at for at in range(DECISIONS_MAX)]


def test_decisions_read_back_as_they_were_made() -> None:
    made = [
        Placed(StepId("s"), WORKER, "warm", 40, 32, WORKER, 38, 38, None, HOME, {"a": 1}, 0.25, None, 7),
        Moved(StepId("s"), None, "unavailable", 3),
        Replaced(StepId("s"), NodeId("prefill-0"), 20.0, 5.5),
        Recalled(WORKER, "it is expected", 5, 7, 0.5),
    ]
    m = Machine()
    step = m.begin("a", 0.0, "s", agent="x")
    m.send(StepPlaced(key("a"), made[0], None, False), 1.0)
    for decision in made[1:3]:
        m.send(StepMoved(key("a"), decision), 2.0)
    m.end("a", step, 3.0, left([1, 2, 3]), hits=Hits(3, 2, 1, 0, {"evicted": 3}), output_tokens=9)
    m.answer("a", step, 4.0, tools=("bash", "grep"))
    m.send(ContextRecalled(key("a"), step, None, made[3]), 5.0)
    m.send(PinAsked(key("a"), 0.0, PinWish("soft", 5.0, 8.0, 1)), 6.0)
    decisions = [entry.decision for entry in m.trace("a").decisions]
    assert decisions[:3] == made[:3]
    ended, retained, recalled, asked = decisions[3:]
    assert ended == Ended(step, "stop", 0, 9, 3.0, Hits(3, 2, 1, 0, {"evicted": 3}))
    assert isinstance(retained, Retained)
    assert (retained.tools, retained.situation.tokens, retained.retention) == (
        ("bash", "grep"), 3, m.trace("a").retention
    )  # fmt: skip
    assert recalled == made[3]
    assert asked == Asked("pin", {"kind": "soft", "ttl_s": 0.0, "priority": 8.0, "replicas": 1})


def test_what_is_decided_rests_on_the_tools_and_on_what_was_seen() -> None:
    m = Machine()
    for at in range(3):
        m.step("a", 10.0 * at, [*range(8 + at)], called=("bash",), agent="x")
    retained = [e.decision for e in m.trace("a").decisions if isinstance(e.decision, Retained)]
    assert [(decision.tools, decision.seen) for decision in retained] == [(("bash",), at) for at in range(3)]
    assert retained[2].situation.reload_s == pytest.approx(0.010)


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


def test_texts_are_those_of_the_trace_and_share_their_tokens_with_its_context() -> None:
    m = Machine()
    for answered_first in (False, True):
        name = f"t{answered_first}"
        step = m.begin(name, 0.0)
        said = Said(fresh("hello", [1, 2, 3], [(2, 1)]), "xy", pack_tokens([4, 5]))
        if answered_first:
            m.answer(name, step, 1.0, said=said)
        m.end(name, step, 1.0, left([1, 2, 3, 4]))
        if not answered_first:
            m.answer(name, step, 1.0, said=said)
        trace = m.trace(name)
        assert trace.texts[0].packed is trace.lefts[0].packed
        assert m.traces.known([key(name)], "helloxy and", CutTokens({})).ids == [1, 2, 3, 4, 5]
    assert m.traces.known([key("nobody"), key("tTrue")], "hello", CutTokens({})).ids == [1, 2, 3]
    step = m.begin("tTrue", 2.0)
    m.end("tTrue", step, 3.0, final=True)
    m.answer("tTrue", step, 3.0)
    assert m.trace("tTrue").texts == (), "nobody goes on from there"


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
    m.send(Suspended(key("b"), 5.0, 500.0, None), 71.0)
    m.send(PinAsked(key("b"), 9.0, PinWish("hard", 80.0, 2.0, 1)), 71.0)
    m.send(PinHeld(key("b"), PinWish("hard", 80.0, 2.0, 1, HOME, BlockHash(b"1" * 16))), 72.0)
    m.send(Tick(), 76.0)
    m.send(
        ContextRecalled(key("b"), StepId("b-60.0"), Warm(WORKER, Generation(2), 5), Recalled(WORKER, "", 1, 5, 0.1)),
        77.0,
    )
    m.send(Resumed(key("b")), 78.0)
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
    if isinstance(part, (Traces, Alarms, Lookups, Gaps)):
        return {name: state(value) for name, value in vars(part).items() if name != "_between"}
    return list(part.items()) if isinstance(part, dict) else part


def test_limits_that_are_gone_are_refused() -> None:
    for name in ("contexts_bytes_max", "decisions_max"):
        with pytest.raises(msgspec.ValidationError, match=name):
            msgspec.convert({name: 5}, DispatchConfig)
    for name in ("traces_max", "texts_bytes_max", "messages_max"):
        with pytest.raises(msgspec.ValidationError, match=name):
            msgspec.convert({name: 5}, ApiConfig)
