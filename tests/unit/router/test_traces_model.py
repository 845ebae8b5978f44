"""The traces' machine against a plain model: dictionaries, no lookups, no sharing, everything by search."""

from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.fleet.load import Warm
from router.policy.retention import RetentionConfig
from router.traces.contexts import LEAVES_MAX, Left, joined
from router.traces.decisions import Asked, Moved, Placed, Recalled, Retained
from router.traces.effects import BringBack, Effect, EndPin, FreeContext, SetPin, StopSteps, Told
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
from router.traces.machine import Traces
from router.traces.prefixes import Heard, Place, digests
from router.traces.texts import TEXTS_MAX, CutTokens, Said, find, fresh
from router.traces.trace import PinWish, Trace
from tracehaul.wire.hashing import chain, pack_tokens
from tracehaul.wire.ids import BlockHash, Generation, NodeId, StepId, TraceId

TRACES_MAX, BYTES_MAX, BLOCK = 4, 30_000, 2
ROOT = BlockHash(b"r" * 16)
HOMES = [None, NodeId("store-0"), NodeId("store-1")]
WORKERS = [NodeId("decode-0"), NodeId("decode-1")]
KEYS = [("", TraceId(name)) for name in "abc"] + [("red", TraceId("a"))]
NO_CUTS = CutTokens({})
keys, words = st.sampled_from(KEYS), st.text("xy", min_size=1, max_size=4)


@dataclass
class Known:
    """A trace as the model has it."""

    parent: str | None = None
    steps: int = 0
    begun: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    contexts: list[list[Any]] = field(default_factory=list)
    """[step, tokens, warm]."""
    texts: list[tuple[str, str, list[int]]] = field(default_factory=list)
    """(prompt, answer, ids of both)."""
    calls: tuple[str, ...] | None = None
    suspended: bool = False
    ended: bool = False
    decided: bool = False
    home: str | None = None
    worker: str | None = None
    wish: PinWish | None = None
    idle_s: float | None = None
    messages: list[bytes] = field(default_factory=list)
    tip: bytes | None = None
    open: int = 0
    responses: list[str] = field(default_factory=list)
    alarms: list[float] = field(default_factory=list)
    size: int = 0

    @property
    def state(self) -> str:
        if self.running:
            return "running"
        return "ended" if self.ended else "suspended" if self.suspended else "acting"


class Model(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.config = RetentionConfig()
        self.traces = Traces(TRACES_MAX, BYTES_MAX, self.config)
        self.known: dict[tuple[str, str], Known] = {}
        """In the order of their use."""
        self.given: dict[str, tuple[str, TraceId]] = {}
        """Who gave a response last."""
        self.now_s = 0.0
        self.steps: list[tuple[tuple[str, TraceId], StepId]] = []

    # --- what is common to all events -----------------------------------------------------------------------

    def send(self, event: Event) -> list[Effect]:
        effects = self.traces.handle(event, self.now_s)
        self.traces.check()
        return effects

    def settle_limits(self) -> None:
        """Who was forgotten is who should be: the least recently used idle ones, and no more than had to be."""
        there = {key for key in self.known if self.traces._traces.get(key) is not None}
        idle = [key for key, known in self.known.items() if not known.running and not known.open]
        gone = [key for key in self.known if key not in there]
        assert gone == idle[: len(gone)]
        if gone:
            spared = self.known[gone[-1]].size
            # Fewer than are too many where the others run.
            least = len(gone) <= len(self.known) - TRACES_MAX or self.traces.nbytes + spared > BYTES_MAX - 3000
            assert least, "one more than had to be"
        for key in gone:
            self.forget(key)
        for key, known in self.known.items():
            known.size = self.traces._traces[key].nbytes

    def forget(self, key: tuple[str, str]) -> None:
        del self.known[key]
        self.given = {response: owner for response, owner in self.given.items() if owner != key}

    def touch(self, key: tuple[str, str]) -> Known:
        known = self.known.pop(key, None) or Known()
        self.known[key] = known
        return known

    def expect_decision(self, known: Known, effects: list[Effect], *, told: bool) -> None:
        """A decision with all that follows from it."""
        (retained,) = [
            e.entry.decision for e in effects if isinstance(e, Told) and isinstance(e.entry.decision, Retained)
        ]
        plan = retained.retention
        assert retained.tools == known.calls
        pins = [effect for effect in effects if isinstance(effect, SetPin)]
        last = self.last(known)
        expected = []
        if known.home is not None and last is not None:
            expected = ["~"]
            wish = known.wish
            if (
                wish is not None
                and wish.until_s > self.now_s
                and (told or (wish.home, wish.last) != (known.home, last))
            ):
                expected.append("")
                known.wish = PinWish(wish.kind, wish.until_s, wish.priority, wish.replicas, known.home, last)
        assert [pin.name[1:] for pin in pins] == expected
        assert all((pin.home, pin.last) == (known.home, last) for pin in pins)
        known.alarms = []
        if plan.recall_s is not None:
            since_s = self.now_s if told else known.idle_s
            known.alarms.append(max(self.now_s, since_s + plan.recall_s))

    def no_decision(self, effects: list[Effect]) -> None:
        assert not [e for e in effects if isinstance(e, SetPin)]
        assert not [e for e in effects if isinstance(e, Told) and isinstance(e.entry.decision, Retained)]

    def last(self, known: Known) -> bytes | None:
        hashes = chain(ROOT, pack_tokens(known.contexts[-1][1]), BLOCK) if known.contexts else []
        return hashes[-1] if hashes else None

    def settled(self, known: Known, effects: list[Effect]) -> None:
        if known.state == "acting" and not known.unanswered and not known.decided and known.contexts:
            known.decided = True
            self.expect_decision(known, effects, told=False)
        else:
            self.no_decision(effects)

    def over(self, known: Known) -> None:
        known.contexts, known.texts, known.alarms, known.wish = [], [], [], None

    # --- calls and steps ------------------------------------------------------------------------------------

    @rule(key=keys, parent=st.sampled_from([None, "a", "b", "c"]))
    def begin(self, key, parent) -> None:
        step = StepId(f"s{len(self.steps)}")
        self.steps.append((key, step))
        known = self.known.get(key) or Known()
        if not known.steps:
            known.parent = parent if parent != key[1] else None
            origin = self.known.get((key[0], known.parent))
            if origin is not None and known.parent is not None:
                self.touch((key[0], known.parent))
                known.home = origin.home
        self.known[key] = known
        self.touch(key)
        known.steps += 1
        known.begun.append(step)
        known.running.append(step)
        known.unanswered.append(step)
        known.calls, known.suspended, known.ended, known.decided = None, False, False, False
        known.idle_s, known.alarms = None, []
        self.no_decision(self.send(StepBegan(key, step, parent, 5)))
        self.settle_limits()

    @rule(at=st.integers(0), home=st.sampled_from(HOMES), worker=st.sampled_from(WORKERS), takes=st.booleans())
    def place(self, at, home, worker, takes) -> None:
        if not self.steps:
            return
        key, step = self.steps[at % len(self.steps)]
        known = self.known.get(key)
        origin = self.known.get((key[0], known.parent)) if known is not None and known.parent else None
        continues = origin.contexts[-1][0] if origin is not None and origin.contexts else None
        decision = Placed(step, worker, "", 5, 0, None, 0, 0, None, home, {})
        effects = self.send(StepPlaced(key, decision, continues, takes))
        lives = known is not None and step in known.running
        assert bool(effects) == lives
        if lives:
            known.home, known.worker = home, worker
            if takes and continues is not None:
                origin.contexts[-1][2] = None
        self.settle_limits()

    @rule(at=st.integers(0))
    def move(self, at) -> None:
        if self.steps:
            key, step = self.steps[at % len(self.steps)]
            lives = key in self.known and step in self.known[key].running
            assert bool(self.send(StepMoved(key, Moved(step, None, "lost", 0)))) == lives
            self.settle_limits()

    @rule(
        at=st.integers(0),
        tokens=st.none() | st.lists(st.integers(0, 1), min_size=1, max_size=6),
        warm=st.sampled_from([None, *WORKERS]),
        final=st.sampled_from([False, False, False, True]),
    )
    def end(self, at, tokens, warm, final) -> None:
        if not self.steps:
            return
        key, step = self.steps[at % len(self.steps)]
        known = self.known.get(key)
        left, holds = None, Warm(warm, Generation(1), 1) if warm else None
        if tokens is not None:
            packed = pack_tokens(tokens)
            left = Left(step, ROOT, BLOCK, packed, joined(chain(ROOT, packed, BLOCK)), 0, holds)
        effects = self.send(StepEnded(key, step, "stop", 1, None, left, 1e-3, final))
        if known is None or step not in known.running:
            assert effects == []
            self.settle_limits()
            return
        known.running.remove(step)
        if tokens is not None:
            kept = [c for c in known.contexts if tokens[: len(c[1])] != c[1]]
            known.contexts = [*kept[-(LEAVES_MAX - 1) :], [step, tokens, holds]]
        known.ended = known.ended or final
        if not known.running:
            known.idle_s = self.now_s
            if known.ended:
                ends = [known.home] * (1 + (known.wish is not None)) if known.home else []
                assert [effect.home for effect in effects if isinstance(effect, EndPin)] == ends
                freed = [effect.worker for effect in effects if isinstance(effect, FreeContext)]
                assert freed == ([known.worker] if known.worker else [])
                self.over(known)
        self.settled(known, effects)
        self.settle_limits()

    @rule(
        at=st.integers(0),
        tools=st.sampled_from([None, (), ("bash",)]),
        said=st.none() | st.tuples(words, words),
        response=st.sampled_from([None, "r1", "r2", "r3"]),
        name=st.sampled_from([None, "h1", "h2"]),
    )
    def answer(self, at, tools, said, response, name) -> None:
        if not self.steps:
            return
        key, step = self.steps[at % len(self.steps)]
        known = self.known.get(key)
        heard = None
        if said is not None:
            prompt, answer = said
            ids = [ord(c) % 2 for c in prompt + answer]
            heard = Said(fresh(prompt, ids[: len(prompt)], []), answer, pack_tokens(ids[len(prompt) :]))
        effects = self.send(Answered(key, step, response, tools, heard, name))
        if known is None or step not in known.unanswered:
            assert effects == []
            self.settle_limits()
            return
        known.unanswered.remove(step)
        known.calls = known.calls if tools is None else tools
        for found in (response, name):
            if found is not None:
                self.given[found] = key
                known.responses += [found] if found not in known.responses else []
        if said is not None and known.state != "ended":
            kept = [text for text in known.texts if not (prompt + answer).startswith(text[0] + text[1])]
            known.texts = [*kept[-(TEXTS_MAX - 1) :], (prompt, answer, ids)]
        self.settled(known, effects)
        self.settle_limits()

    @rule(key=keys, worker=st.sampled_from(WORKERS), tokens=st.integers(0, 3))
    def recalled(self, key, worker, tokens) -> None:
        known = self.known.get(key)
        step = known.contexts[0][0] if known is not None and known.contexts else StepId("none")
        warm = Warm(worker, Generation(1), tokens) if tokens else None
        effects = self.send(ContextRecalled(key, step, warm, Recalled(worker, "", 1, tokens, 0.1)))
        assert bool(effects) == (known is not None)
        if known is not None and known.contexts and warm is not None:
            known.contexts[0][2] = warm
        self.settle_limits()

    @rule(
        words=st.text("pq", min_size=0, max_size=4),
        salt=st.sampled_from(["", "red"]),
        first=st.booleans(),
        heard=st.none() | st.builds(Heard, st.integers(0, 3), st.sampled_from(["h1", "h2"])),
    )
    def call(self, words, salt, first, heard) -> None:
        """A conversation is placed, and begins a step or not; what it holds open may be over at any time."""
        conversation = digests(salt, [word.encode() for word in words])
        fresh_name = TraceId(f"call-{len(self.steps)}")
        place = self.traces.place(salt, conversation, fresh_name, first=first, heard=heard)
        owners = {digest: key for key, known in self.known.items() for digest in known.messages}
        longest = next((digest for digest in reversed(conversation) if digest in owners), None)
        unheard = heard is not None and (longest is None or conversation.index(longest) < heard.at)
        heard_by = [self.given[heard.name]] if unheard and self.given.get(heard.name, ("nobody's",))[0] == salt else []
        if first and longest is not None and longest == conversation[-1]:
            assert place == Place(fresh_name, shared=True)
        elif heard_by:
            assert place == Place(heard_by[0][1])
        elif longest is None:
            assert place == Place(fresh_name)
        else:
            owner = owners[longest]
            same = self.known[owner].tip == longest
            assert place == (Place(owner[1]) if same else Place(fresh_name, owner[1]))
        key = (salt, place.trace)
        known = self.touch(key)
        known.open += 1
        for at, digest in enumerate(conversation):
            if digest not in owners or (at == len(conversation) - 1 and owners[digest] != key):
                if digest in owners:
                    loser = self.known[owners[digest]]
                    loser.messages.remove(digest)
                    loser.tip = None if loser.tip == digest else loser.tip
                known.messages.append(digest)
        known.tip = conversation[-1] if conversation and not place.shared else known.tip
        assert self.send(Recognised(key, tuple(conversation), place.shared)) == []
        self.settle_limits()

    @rule(at=st.integers(0))
    def call_over(self, at) -> None:
        opened = [key for key, known in self.known.items() if known.open]
        if not opened:
            return
        key = opened[at % len(opened)]
        known = self.known[key]
        known.open -= 1
        assert self.send(CallOver(key)) == []
        if not known.steps and not known.open:
            assert key not in self.traces._traces
            self.forget(key)
        self.settle_limits()

    # --- clients and time -----------------------------------------------------------------------------------

    @rule(
        key=keys,
        expected_s=st.floats(1, 50),
        deadline_s=st.none() | st.floats(1, 90),
        tool=st.sampled_from([None, "x"]),
    )
    def suspend(self, key, expected_s, deadline_s, tool) -> None:
        known = self.known.get(key)
        effects = self.send(Suspended(key, expected_s, deadline_s, tool))
        if known is None or known.state not in ("acting", "suspended"):
            assert effects == []
            return
        known.suspended = True
        known.calls = (tool,) if tool else known.calls
        self.expect_decision(known, effects, told=True)
        if deadline_s is not None:
            known.alarms.append(self.now_s + deadline_s)
        self.settle_limits()

    @rule(key=keys)
    def resume(self, key) -> None:
        known = self.known.get(key)
        effects = self.send(Resumed(key))
        if known is None or known.state not in ("acting", "suspended"):
            assert effects == []
            return
        known.suspended, known.alarms = False, []
        assert len([e for e in effects if isinstance(e, BringBack)]) == bool(known.contexts)
        self.settle_limits()

    @rule(key=keys, ttl_s=st.sampled_from([0.0, 30.0]), held=st.booleans())
    def pin(self, key, ttl_s, held) -> None:
        known = self.known.get(key)
        wish = PinWish("soft", self.now_s + ttl_s, 8.0, 1)
        effects = self.send(PinAsked(key, ttl_s, wish))
        assert [type(e.entry.decision) for e in effects] == ([Asked] if known is not None else [])
        if known is not None and not ttl_s:
            known.wish = None
        if ttl_s and held:
            assert self.send(PinHeld(key, wish)) == []
            if known is not None:
                known.wish = wish
        self.settle_limits()

    @rule(key=keys)
    def delete(self, key) -> None:
        known = self.known.get(key)
        effects = self.send(Deleted(key))
        if known is None:
            assert effects == []
            return
        stopped = [effect.steps for effect in effects if isinstance(effect, StopSteps)]
        assert stopped == ([tuple(known.running)] if known.running else [])
        workers = [context[2].node for context in known.contexts if context[2] is not None]
        workers += [known.worker] if known.worker else []
        freed = [effect.worker for effect in effects if isinstance(effect, FreeContext)]
        assert freed == list(dict.fromkeys(workers))
        self.forget(key)
        self.settle_limits()

    @rule(seconds=st.floats(0, 60))
    def wait(self, seconds) -> None:
        self.now_s += seconds
        effects = self.send(Tick())
        back = []
        for key, known in self.known.items():
            due = [at_s for at_s in known.alarms if at_s <= self.now_s]
            known.alarms = [at_s for at_s in known.alarms if at_s > self.now_s]
            machine = self.traces._traces[key]
            if due and known.suspended and machine.ended:  # the deadline, which comes after all others
                known.suspended, known.ended = False, True
                self.over(known)
            back += [key for _ in due]
        asked = [effect.key for effect in effects if isinstance(effect, BringBack)]
        assert set(asked) <= set(back)
        self.settle_limits()

    # --- what must be equal ---------------------------------------------------------------------------------

    @invariant()
    def the_same(self) -> None:
        machine: dict[Any, Trace] = dict(self.traces._traces)
        assert list(machine) == list(self.known)
        for key, known in self.known.items():
            trace = machine[key]
            children = [k[1] for k, other in self.known.items() if (k[0], other.parent) == key and other.steps]
            assert set(trace.children) <= set(children)
            assert (trace.state, trace.parent, trace.home, trace.worker) == (
                known.state, known.parent, known.home, known.worker
            )  # fmt: skip
            assert [step.step for step in trace.running] == known.running
            assert list(trace.unanswered) == known.unanswered
            assert sorted(step.step for step in trace.steps) == sorted(known.begun[-trace.steps_count :])
            assert [[c.step, list(memoryview(c.packed).cast("I")), c.warm] for c in trace.lefts] == known.contexts
            assert (trace.calls, trace.idle_since_s, trace.pin) == (known.calls, known.idle_s, known.wish)
            assert (set(trace.digests), trace.tip) == (set(known.messages), known.tip)
            assert list(trace.responses) == known.responses
            assert [text.text for text in trace.texts] == [prompt + answer for prompt, answer, _ in known.texts]
            for prompt, answer, ids in known.texts:
                found = find(self.traces.texts([key]), prompt + answer + "z", NO_CUTS)
                assert (found.text, found.ids) == max(
                    ((p + a, i) for p, a, i in known.texts if (prompt + answer).startswith(p + a)),
                    key=lambda pair: len(pair[0]),
                )
                assert found.ids == ids
        shown = [trace.key for trace in self.traces.all()]
        assert shown == [key for key, known in self.known.items() if known.steps]
        for response in ("r1", "r2", "r3", "h1"):
            owner = self.given.get(response)
            for salt in ("", "red"):
                expected = owner[1] if owner is not None and owner[0] == salt else None
                assert self.traces.response(salt, response) == expected
        alarms = [at_s for known in self.known.values() for at_s in known.alarms]
        assert self.traces.next_alarm_s == min(alarms, default=None)


Model.TestCase.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
test_the_machine_does_as_the_model = Model.TestCase
