"""The traces as one state machine, and what their steps leave."""

import pytest

from router.fleet.load import Warm
from router.policy.retention import RetentionConfig
from router.traces.contexts import Left, joined
from router.traces.decisions import DECISIONS_MAX, Asked, Ended, Moved, Placed, Recalled, Replaced, Retained
from router.traces.effects import Effect, Told
from router.traces.events import (
    Answered,
    ContextRecalled,
    Deleted,
    Event,
    PinAsked,
    Resumed,
    StepBegan,
    StepEnded,
    StepMoved,
    StepPlaced,
)
from router.traces.hits import Hits
from router.traces.machine import Traces
from router.traces.texts import CutTokens, Said, find, fresh
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
        assert find(m.traces.texts([key(name)]), "helloxy and", CutTokens({})).ids == [1, 2, 3, 4, 5]
    assert find(m.traces.texts([key("nobody"), key("tTrue")]), "hello", CutTokens({})).ids == [1, 2, 3]
    step = m.begin("tTrue", 2.0)
    m.end("tTrue", step, 3.0, final=True)
    m.answer("tTrue", step, 3.0)
    assert m.trace("tTrue").texts == (), "nobody goes on from there"
