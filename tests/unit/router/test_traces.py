"""The registry of traces, and what their steps leave."""

from hypothesis import given
from hypothesis import strategies as st

from router.fleet.load import Warm
from router.traces.contexts import LEAVES_MAX, Left, cut, grow
from router.traces.decisions import DECISIONS_MAX, Asked, Decisions
from router.traces.hits import Hits
from router.traces.registry import OTHER_TOOLS, STEPS_MAX, TOOLS_MAX, Step, Trace, TraceKey, Traces
from tracehaul.wire.hashing import chain, pack_tokens
from tracehaul.wire.ids import BlockHash, Generation, NodeId, StepId, TraceId

ROOT = BlockHash(b"r" * 16)
BLOCK = 4


def key(name: str, salt: str = "") -> TraceKey:
    return salt, TraceId(name)


def left(tokens: list[int], step: str = "s", warm: Warm | None = None, root: BlockHash = ROOT) -> Left:
    packed = pack_tokens(tokens)
    return Left(StepId(step), root, BLOCK, packed, chain(root, packed, BLOCK), len(tokens), warm)


def registry(traces_max: int = 10, contexts_bytes_max: int = 1 << 20) -> Traces:
    return Traces(traces_max, contexts_bytes_max)


def step(
    traces: Traces, name: str, at_s: float, *, parent: str | None = None, tools: tuple[str, ...] = ()
) -> tuple[Trace, Step]:
    """One that takes a second."""
    origin = None if parent is None else TraceId(parent)
    trace, begun = traces.start(key(name), origin, StepId(f"{name}-{at_s}"), at_s, tools=tools)
    traces.end(trace, begun, at_s + 1.0, final=False)
    traces.check()
    return trace, begun


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
    assert grow([one, two], left([1, 2, 3])) == [two, left([1, 2, 3])]
    many = [left([n]) for n in range(LEAVES_MAX)]
    assert grow(many, left([99])) == [*many[1:], left([99])]


def test_a_traces_life() -> None:
    traces = registry()
    trace, first = traces.start(key("a"), None, StepId("1"), 10.0, prompt_tokens=7, agent="x")
    assert (trace.state, first.gap, first.parent) == ("running", None, None)
    first.output_tokens, first.hits = 5, Hits(delivered=2)
    traces.leave(trace, left([1, 2, 3]))
    traces.end(trace, first, 12.0, final=False)
    assert (trace.state, trace.context_tokens, trace.idle_since_s) == ("acting", 3, 12.0)
    trace.calls = ("bash",)
    _, second = traces.start(key("a"), None, StepId("2"), 15.0)
    assert second.gap is not None
    assert (second.gap.tools, second.gap.seconds, second.parent) == (("bash",), 3.0, "1")
    assert (trace.tools["bash"].uses, trace.tools["bash"].seconds) == (1, 3.0)
    assert trace.agent == "x"
    traces.end(trace, second, 16.0, final=True)
    assert (trace.state, trace.context_tokens, traces.contexts_bytes) == ("ended", 0, 0)
    assert (trace.service.tokens_computed, trace.service.tokens_decoded, trace.service.seconds) == (5, 5, 3.0)
    traces.check()


def test_the_prompt_knows_best_what_ran_before() -> None:
    traces = registry()
    trace, _ = step(traces, "a", 0.0)
    trace.calls = ("bash",)
    _, second = step(traces, "a", 5.0, tools=("bash", "grep"))
    assert second.gap is not None
    assert second.gap.tools == ("bash", "grep")
    assert trace.tools["grep"].longest_s == 4.0


def test_a_step_beside_another_has_no_gap() -> None:
    traces = registry()
    trace, first = traces.start(key("a"), None, StepId("1"), 0.0)
    _, second = traces.start(key("a"), None, StepId("2"), 1.0)
    assert second.gap is None
    traces.end(trace, second, 2.0, final=False)
    assert trace.state == "running"
    traces.end(trace, first, 3.0, final=False)
    assert trace.idle_since_s == 3.0


def test_a_fork_starts_at_its_parents_places() -> None:
    traces = registry()
    parent, _ = step(traces, "a", 0.0)
    parent.home = NodeId("store-1")
    warm = Warm(NodeId("decode-0"), Generation(1), 3)
    traces.leave(parent, left([1, 2, 3], "last", warm))
    child, begun = traces.start(key("b"), TraceId("a"), StepId("1"), 2.0)
    assert (child.home, begun.parent, list(parent.children)) == ("store-1", "last", ["b"])
    assert traces.lefts(child) == parent.lefts
    assert traces.start(key("c"), TraceId("c"), StepId("1"), 2.0)[0].parent is None, "nobody is its own parent"


def test_tenants_do_not_meet() -> None:
    traces = registry()
    step(traces, "a", 0.0)
    traces.start(key("a", "red"), TraceId("b"), StepId("1"), 1.0)
    assert len(traces) == 2
    assert [trace.key for trace in traces.of("red")] == [("red", "a")]


def test_traces_are_bounded_and_running_ones_stay() -> None:
    traces = registry(traces_max=2)
    gone: list[Trace] = []
    traces.forgotten = gone.append
    traces.start(key("a"), None, StepId("1"), 0.0)
    step(traces, "b", 1.0, parent="a")
    step(traces, "c", 2.0)
    assert traces.get(key("b")) is None
    assert [trace.trace for trace in gone] == ["b"]
    known = traces.get(key("a"))
    assert known is not None
    assert known.children == {}


def test_contexts_are_bounded_and_the_oldest_go_first() -> None:
    traces = registry(contexts_bytes_max=3 * left([0] * 100).nbytes)
    for name in "abcd":
        trace, _ = step(traces, name, 0.0)
        traces.leave(trace, left([ord(name)] * 100))
        traces.check()
    assert [bool(trace.lefts) for trace in traces.of("")] == [True, True, True, False]


def test_deleting_forgets_and_tells_what_runs() -> None:
    traces = registry()
    step(traces, "a", 0.0)
    trace, begun = traces.start(key("b"), TraceId("a"), StepId("1"), 1.0)
    assert traces.delete(key("b")) is trace
    assert trace.deleted
    traces.leave(trace, left([1]))
    traces.end(trace, begun, 2.0, final=False)
    assert (len(traces), traces.contexts_bytes, traces.delete(key("b"))) == (1, 0, None)


def test_pages_are_the_last_used_first() -> None:
    traces = registry()
    for name in "abc":
        step(traces, name, 0.0)
    page = traces.page("", 2, None)
    assert page is not None
    assert ([trace.trace for trace in page[0]], page[1]) == (["c", "b"], True)
    page = traces.page("", 2, TraceId("b"))
    assert page is not None
    assert ([trace.trace for trace in page[0]], page[1]) == (["a"], False)
    assert traces.page("", 2, TraceId("nobody")) is None


def test_what_one_trace_may_fill_is_bounded() -> None:
    traces = registry()
    for at in range(STEPS_MAX + TOOLS_MAX):
        trace, _ = step(traces, "a", 10.0 * at, tools=(f"tool-{at}",))
    trace = traces.get(key("a"))
    assert trace is not None
    assert (len(trace.steps), trace.steps_count) == (STEPS_MAX, STEPS_MAX + TOOLS_MAX)
    assert len(trace.tools) == TOOLS_MAX + 1
    assert trace.tools[OTHER_TOOLS].uses == STEPS_MAX - 1


def test_decisions_are_bounded_and_those_of_idle_traces_go_first() -> None:
    log = Decisions(decisions_max=DECISIONS_MAX + 3)
    told: list[float] = []
    log.told = lambda trace, entry: told.append(entry.at_s)
    for at in range(3):
        log.add(key("a"), at, Asked("resume", {}))
    for at in range(DECISIONS_MAX + 5):
        log.add(key("b"), at, Asked("resume", {}))
    assert (len(log), len(log.of(key("a"))), len(log.of(key("b")))) == (DECISIONS_MAX + 3, 3, DECISIONS_MAX)
    assert log.of(key("b"))[0].at_s == 5
    log.add(key("c"), 0.0, Asked("resume", {}))
    assert (len(log), log.of(key("a"))) == (DECISIONS_MAX + 1, [])
    log.forget(key("b"))
    assert (len(log), len(told)) == (1, DECISIONS_MAX + 9)
