"""The index against a naive model, and what was dispatched a moment ago."""

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from router.dispatch.predicted import PROMPTS_MAX, SIBLINGS_MAX, TTL_S, Predicted, shared_blocks
from router.fleet.index import Index, Match, TierRun
from tracehaul.wire.blocks import Change, Events, Moved, Removed, Snapshot, Stored
from tracehaul.wire.ids import BlockHash, Generation, NodeId

NODES = [NodeId(f"store-{n}") for n in range(3)]
BLOCKS = [BlockHash(n.to_bytes(16, "big")) for n in range(12)]
some_node = st.sampled_from(NODES)
TIERS = 3
some_tier = st.integers(0, TIERS - 1)
some_blocks = st.lists(st.sampled_from(BLOCKS), max_size=6)


def spans(runs: Sequence[TierRun]) -> Iterator[tuple[TierRun, int]]:
    """Each with its length."""
    begin = 0
    for run in runs:
        yield run, run.end - begin
        begin = run.end


class Store:
    """A node that numbers its changes."""

    def __init__(self) -> None:
        self.generation = Generation(1)
        self.sequence = 0
        self.held: dict[BlockHash, int] = {}
        self.unsent: list[Change] = []


class IndexMachine(RuleBasedStateMachine):
    """Stores change, tell, are told late, twice or with holes; the index is exact or knows that it is not."""

    @initialize()
    def start(self) -> None:
        self.index = Index()
        self.stores = {node: Store() for node in NODES}
        self.known: dict[NodeId, dict[BlockHash, int]] = {}

    @rule(node=some_node, blocks=some_blocks, tier=some_tier)
    def change(self, node: NodeId, blocks: list[BlockHash], tier: int) -> None:
        store = self.stores[node]
        for block in blocks:
            if block in store.held:
                store.unsent.append(Removed(block))
                del store.held[block]
            else:
                store.unsent.append(Stored(block, tier))
                store.held[block] = tier

    @rule(node=some_node, blocks=some_blocks, tier=some_tier)
    def move(self, node: NodeId, blocks: list[BlockHash], tier: int) -> None:
        store = self.stores[node]
        for block in store.held.keys() & set(blocks):
            store.unsent.append(Moved(block, tier))
            store.held[block] = tier

    @rule(node=some_node, repeat=st.integers(0, 3))
    def tell(self, node: NodeId, repeat: int) -> None:
        """Its changes, perhaps with some that were told before in the same message."""
        store = self.stores[node]
        if not store.unsent:
            return
        again = tuple(Stored(BLOCKS[0]) for _ in range(min(repeat, store.sequence)))
        message = Events(store.generation, store.sequence + 1 - len(again), (*again, *store.unsent))
        taken = self.index.events(node, message)
        assert taken == (node in self.known), "only a node whose snapshot is complete can be followed"
        store.sequence += len(store.unsent)
        store.unsent = []
        if taken:
            self.known[node] = dict(store.held)

    @rule(node=some_node, parts=st.integers(1, 3))
    def subscribe(self, node: NodeId, parts: int) -> None:
        store = self.stores[node]
        store.sequence += len(store.unsent)
        store.unsent = []
        told: list[tuple[int, tuple[BlockHash, ...]]] = []
        for tier in range(TIERS):
            held = sorted(block for block, where in store.held.items() if where == tier)
            told += [(tier, tuple(held[part::parts])) for part in range(parts)]
        for place, (tier, blocks) in enumerate(told):
            last = place == len(told) - 1
            self.index.snapshot(node, Snapshot(store.generation, store.sequence, blocks, last, tier))
        self.known[node] = dict(store.held)

    @rule(node=some_node, block=st.sampled_from(BLOCKS))
    def hole(self, node: NodeId, block: BlockHash) -> None:
        store = self.stores[node]
        assert not self.index.events(node, Events(store.generation, store.sequence + 2, (Stored(block),)))

    @rule(node=some_node)
    def forget(self, node: NodeId) -> None:
        self.index.forget(node)
        self.known.pop(node, None)

    @rule(node=some_node)
    def restart(self, node: NodeId) -> None:
        self.index.forget(node)
        self.known.pop(node, None)
        generation = Generation(self.stores[node].generation + 1)
        self.stores[node] = Store()
        self.stores[node].generation = generation

    @rule(blocks_max=st.integers(0, 5))
    def sweep(self, blocks_max: int) -> None:
        self.index.sweep(blocks_max)

    @rule(hashes=st.permutations(BLOCKS), length=st.integers(0, len(BLOCKS)))
    def match(self, hashes: list[BlockHash], length: int) -> None:
        asked = hashes[:length]

        def run(*held: dict[BlockHash, int]) -> int:
            return next((i for i, block in enumerate(asked) if not any(block in h for h in held)), len(asked))

        alone = {node: run(held) for node, held in self.known.items()}
        together = run(*self.known.values())
        match = self.index.match(asked)
        assert (match.blocks, match.by_node) == (together, {node: n for node, n in alone.items() if n})
        best = [min(held[block] for held in self.known.values() if block in held) for block in asked[:together]]
        assert [run.tier for run, length in spans(match.runs) for _ in range(length)] == best
        assert all(one.tier != other.tier for one, other in pairwise(match.runs))

    @invariant()
    def agrees(self) -> None:
        self.index.check()
        for node in NODES:
            assert self.index.held(node) == self.known.get(node, {})


TestIndexModel = IndexMachine.TestCase
TestIndexModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_nothing_of_a_lost_node_is_left_after_the_sweep() -> None:
    index = Index()
    for node in NODES[:2]:
        index.snapshot(node, Snapshot(Generation(1), 0, tuple(BLOCKS), last=True))
    index.forget(NODES[0])
    assert index.match(BLOCKS) == Match(12, {NODES[1]: 12}, (TierRun(12, 0),)), "at once"
    index.snapshot(NODES[0], Snapshot(Generation(1), 4, tuple(BLOCKS[:5]), last=True))
    assert index.sweep(7)
    assert not index.sweep(7)
    by_node = {NODES[1]: 12, NODES[0]: 5}
    assert index.match(BLOCKS) == Match(12, by_node, (TierRun(12, 0),)), "its next subscription has a bit of its own"
    index.check()


def hashes(*names: int) -> list[BlockHash]:
    return [BLOCKS[name] for name in names]


def test_siblings_are_expected_where_the_first_was_sent_until_that_is_stale() -> None:
    predicted = Predicted()
    a, b = NODES[:2]
    predicted.add(hashes(0, 1, 2, 3), [a], now_s=10)
    predicted.add(hashes(0, 1, 5), [a, b], now_s=12)
    assert predicted.match(hashes(0, 1, 2, 7), now_s=12) == {a: 3, b: 2}
    own = hashes(9, 2)
    predicted.add(own, [a], now_s=12)
    assert (predicted.match(own, now_s=12), predicted.match(list(own), now_s=12)) == ({}, {a: 2})
    assert predicted.match(hashes(9, 1), now_s=12) == {a: 1}
    assert predicted.match(hashes(8, 1), now_s=12) == {}
    predicted.renew(own, now_s=12 + TTL_S)
    assert predicted.match(hashes(9, 1), now_s=12 + TTL_S) == {a: 1}
    assert predicted.match(hashes(9, 1), now_s=12 + 2 * TTL_S) == {}
    assert predicted.match([], now_s=12) == {}
    assert predicted.match(hashes(0, 1, 2, 7), now_s=10 + TTL_S) == {a: 2, b: 2}
    assert predicted.match(hashes(0), now_s=12 + TTL_S) == predicted.match(own, now_s=12 + TTL_S) == {}
    assert len(predicted) == 0


def test_what_was_dispatched_is_bounded() -> None:
    predicted = Predicted()
    for n in range(SIBLINGS_MAX + 3):
        predicted.add(hashes(0, 1), [NodeId(f"n{n}")], now_s=0)
    assert len(predicted.match(hashes(0), now_s=0)) == SIBLINGS_MAX
    for n in range(PROMPTS_MAX + 10):
        predicted.add([BlockHash(b"%016d" % n)], [NODES[0]], now_s=0)
    assert len(predicted) == PROMPTS_MAX
    predicted.add([], NODES, now_s=0)
    assert len(predicted) == PROMPTS_MAX


def test_what_is_stale_is_forgotten_though_nobody_asks_for_it() -> None:
    predicted = Predicted()
    waited_for = hashes(3, 4)
    predicted.add(hashes(0, 1), [NODES[0]], now_s=0)
    predicted.add(hashes(0, 2), [NODES[0]], now_s=2)
    predicted.add(waited_for, [NODES[0]], now_s=2)
    predicted.sweep(now_s=TTL_S)
    assert len(predicted) == 2
    predicted.renew(waited_for, now_s=2 + TTL_S)
    predicted.add(hashes(8), [NODES[0]], now_s=2 + TTL_S)
    assert len(predicted) == 2, "with each that comes, too"
    assert predicted.match(hashes(3, 4), now_s=2 + TTL_S) == {NODES[0]: 2}
    predicted.sweep(now_s=2 + 2 * TTL_S)
    assert len(predicted) == 0


def test_shared_blocks_of_chains() -> None:
    chance = random.Random(1)
    for _ in range(200):
        shared = chance.randrange(9)
        one = list(range(shared)) + [100 + n for n in range(chance.randrange(5))]
        other = list(range(shared)) + [200 + n for n in range(chance.randrange(5))]
        chains = [[BlockHash(b"%016d" % n) for n in names] for names in (one, other)]
        assert shared_blocks(*chains) == shared
