"""Which copies are made by whom: the plan, against a model of a fleet of nodes that only know what they are told."""

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.copies.replicas import RETRY_MIN_S, Replicas, families, prefix_first
from kvstore.index.pins import PinKey
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.hashing import by_weight
from tracehaul.wire.ids import BlockHash, Generation, NodeId, TraceId

GRACE_S = 4.0
KEY: PinKey = ("", TraceId("t"))
A, B, C, D = (NodeId(name) for name in "abcd")
ORDER = by_weight([A, B, C, D], "t")


def infos(*nodes: NodeId, **generations: int) -> list[NodeInfo]:
    return [NodeInfo(n, Generation(generations.get(n, 1)), "store", f"{n}:1") for n in nodes]


def lead(*others: NodeId) -> Replicas:
    """Node ``a`` with a pin for two copies, told of others that were there before it."""
    replicas = Replicas(A, GRACE_S)
    replicas.members(infos(A, *others), (), 0.0)
    replicas.pinned(KEY, 2, (), 0.0)
    return replicas


def test_the_first_in_the_traces_order_takes_the_copy() -> None:
    replicas = lead(B, C, D)
    expected = next(node for node in ORDER if node != A)
    found = replicas.next(0.0)
    assert found is not None
    key, plan = found
    assert (key, plan.targets, plan.holders, plan.everything) == (KEY, (expected,), (A, expected), True)
    replicas.taken(KEY, expected)
    assert replicas.next(0.0) is None
    known = replicas.get(KEY)
    assert known is not None
    assert known.holders == (A, expected)


def test_later_blocks_go_to_who_has_the_copy() -> None:
    replicas = lead(B)
    assert replicas.next(0.0) is not None
    replicas.taken(KEY, B)
    block = BlockHash(b"x" * 16)
    replicas.published(KEY, block)
    replicas.published(KEY, block)
    found = replicas.next(1.0)
    assert found is not None
    assert (found[1].targets, found[1].fresh, found[1].everything) == ((B,), (block,), False)
    assert replicas.next(1.0) is None


def test_only_the_lead_acts_and_the_next_one_after_its_loss() -> None:
    second = Replicas(B, GRACE_S)
    second.members(infos(A, B, C), (), 0.0)
    second.pinned(KEY, 2, (A, B), 0.0)
    assert second.next(0.0) is None
    second.members(infos(B, C), (), 10.0)
    second.tick(10.0 + GRACE_S - 0.1)
    assert second.next(10.0 + GRACE_S - 0.1) is None
    assert second.deadline_s(10.5) == 10.0 + GRACE_S
    assert second.tick(10.0 + GRACE_S) == {A: 1}
    found = second.next(10.0 + GRACE_S)
    assert found is not None
    assert (found[1].targets, found[1].holders) == ((C,), (B, C))
    assert second.ended(KEY) == ()  # nobody has taken it yet


def test_a_lead_that_was_never_seen_has_its_time_to_appear() -> None:
    second = Replicas(B, GRACE_S)
    second.members(infos(B, C), (), 0.0)
    second.pinned(KEY, 2, (A, B), 5.0)
    assert second.next(5.0) is None
    second.tick(5.0 + GRACE_S)
    assert second.next(5.0 + GRACE_S) is not None


def test_who_is_back_in_the_same_life_is_brought_up_to_date() -> None:
    replicas = lead(B, C)
    assert replicas.next(0.0) is not None
    first = next(node for node in ORDER if node in (B, C))
    replicas.taken(KEY, first)
    replicas.members(infos(A, *{B, C} - {first}), (), 1.0)
    replicas.published(KEY, BlockHash(b"x" * 16))
    assert replicas.next(1.0) is None
    replicas.members(infos(A, B, C), (), 2.0)
    found = replicas.next(2.0)
    assert found is not None
    assert (found[1].targets, found[1].everything) == ((first,), True)
    replicas.tick(20.0)
    assert replicas.next(20.0) is None


def test_a_draining_copy_is_replaced_at_once_and_a_draining_lead_leaves_it_to_the_next() -> None:
    replicas = lead(B, C)
    assert replicas.next(0.0) is not None
    first = next(node for node in ORDER if node in (B, C))
    other = C if first == B else B
    replicas.taken(KEY, first)
    replicas.members(infos(A, B, C), (first,), 1.0)
    found = replicas.next(1.0)
    assert found is not None
    assert (found[1].targets, found[1].holders) == ((other,), (A, other))
    replicas.members(infos(A, B, C), (A,), 2.0)
    assert replicas.next(2.0) is None


def test_who_refuses_is_asked_again_after_a_pause_that_grows() -> None:
    replicas = lead(B)
    now_s, pauses = 0.0, []
    for _ in range(4):
        assert replicas.next(now_s) is not None
        replicas.refused(KEY, B, now_s, full=False)
        assert replicas.next(now_s) is None
        at_s = replicas.deadline_s(now_s)
        assert at_s is not None
        pauses.append(at_s - now_s)
        now_s = at_s
        replicas.tick(now_s)
    assert pauses == [RETRY_MIN_S, 2 * RETRY_MIN_S, 4 * RETRY_MIN_S, 8 * RETRY_MIN_S]
    assert replicas.next(now_s) is not None
    replicas.taken(KEY, B)
    assert replicas.deadline_s(now_s) is None


def test_a_full_copy_gives_its_place_to_another() -> None:
    replicas = lead(B, C)
    assert replicas.next(0.0) is not None
    first = next(node for node in ORDER if node in (B, C))
    replicas.taken(KEY, first)
    replicas.published(KEY, BlockHash(b"x" * 16))
    assert replicas.next(1.0) is not None
    replicas.refused(KEY, first, 1.0, full=True)
    found = replicas.next(1.0)
    assert found is not None
    assert found[1].targets == (C if first == B else B,)


def test_two_leads_that_hear_of_each_other_are_one_in_the_end() -> None:
    sets = {node: Replicas(node, GRACE_S) for node in (A, B)}
    for replicas in sets.values():  # both came back with the pin, and neither knows of the other
        replicas.members(infos(A, B), (), 0.0)
        replicas.pinned(KEY, 2, (), 0.0)
    plans = {node: replicas.next(0.0) for node, replicas in sets.items()}
    for node, other in ((A, B), (B, A)):  # their words cross
        found = plans[node]
        assert found is not None
        sets[other].pinned(KEY, 2, found[1].holders, 0.0)
        sets[node].taken(KEY, other)
    known = {node: replicas.get(KEY) for node, replicas in sets.items()}
    first = next(node for node in ORDER if node in (A, B))
    for of in known.values():
        assert of is not None
        assert of.holders[0] == first
        assert set(of.holders) == {A, B}


class FleetOfNodes(RuleBasedStateMachine):
    """Nodes come, go, drain and restart; what the plans ask for is done. In the end each pin has its copies."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.generation = 0
        self.nodes: dict[NodeId, Replicas] = {}
        self.lives: dict[NodeId, int] = {}
        self.has: dict[NodeId, set[PinKey]] = {}
        self.draining: set[NodeId] = set()
        self.pins: dict[PinKey, int] = {}
        self.copies_made = 0
        for name in "abcd":
            self.join(name)
        self.pass_time(3 * GRACE_S)

    def tell(self) -> None:
        members = [NodeInfo(n, Generation(g), "store", str(n)) for n, g in sorted(self.lives.items())]
        for replicas in self.nodes.values():
            replicas.members(members, sorted(self.draining), self.now_s)

    @rule(name=st.sampled_from("abcdef"))
    def join(self, name: str) -> None:
        node = NodeId(name)
        if node not in self.lives:
            self.generation += 1
            self.lives[node] = self.generation
            self.nodes[node] = Replicas(node, GRACE_S)
            self.has[node] = set()
            self.tell()

    @rule(name=st.sampled_from("abcdef"))
    def kill(self, name: str) -> None:
        node = NodeId(name)
        if len(self.lives) > 2 and node in self.lives:
            del self.lives[node], self.nodes[node], self.has[node]
            self.draining.discard(node)
            self.tell()

    @rule(name=st.sampled_from("abcdef"), draining=st.booleans())
    def drain(self, name: str, draining: bool) -> None:
        node = NodeId(name)
        if node in self.lives:
            self.draining = {*self.draining, node} if draining else self.draining - {node}
            self.tell()

    @rule(trace=st.sampled_from("xyz"), replicas=st.integers(1, 3))
    def pin(self, trace: str, replicas: int) -> None:
        key = ("", TraceId(trace))
        able = by_weight([node for node in self.lives if node not in self.draining], trace)
        if able:
            self.pins[key] = replicas
            self.has[able[0]].add(key)
            self.nodes[able[0]].pinned(key, replicas, (), self.now_s)

    @rule(seconds=st.sampled_from([0.1, GRACE_S / 2, GRACE_S, 3 * GRACE_S]))
    def pass_time(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s += 0.5
            for _ in range(20):
                if sum(self.act(node) for node in sorted(self.nodes)) == 0:  # each has its turn
                    break
            else:
                raise AssertionError("they never come to rest")

    def act(self, node: NodeId) -> bool:
        replicas = self.nodes[node]
        replicas.tick(self.now_s)
        found = replicas.next(self.now_s)
        if found is None:
            return False
        key, plan = found
        assert node in self.lives
        for target in plan.targets:
            assert target in self.lives
            assert target != node
            assert target not in self.draining
            if key not in self.has[target]:
                self.copies_made += 1
            self.has[target].add(key)
            self.nodes[target].pinned(key, self.pins[key], plan.holders, self.now_s)
            replicas.taken(key, target)
        return True

    @invariant()
    def at_rest_every_pin_has_its_copies(self) -> None:
        if not self.pins:
            return
        self.pass_time(4 * GRACE_S)
        before = self.copies_made
        self.pass_time(4 * GRACE_S)
        assert self.copies_made == before, "copies are made although nothing happens"
        for key, replicas in self.pins.items():
            staying = [n for n in self.lives if n not in self.draining]
            holders = [n for n in staying if key in self.has[n]]
            if holders and replicas > 1:
                assert len(holders) >= min(replicas, len(staying)), key


FleetOfNodes.TestCase.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)
TestFleetOfNodes = FleetOfNodes.TestCase


@given(st.data())
def test_prefix_first_keeps_every_block_once_and_parents_before_children(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 30))
    hashes = [BlockHash(i.to_bytes(16)) for i in range(count)]
    name: Callable[[int], BlockHash] = lambda i: BlockHash((1000 + i).to_bytes(16))  # noqa: E731
    parents = {h: data.draw(st.sampled_from([*hashes[:i], name(i)])) for i, h in enumerate(hashes)}
    shuffled = data.draw(st.permutations(hashes))
    ordered = prefix_first(shuffled, parents)
    assert sorted(ordered) == sorted(hashes)
    at = {h: i for i, h in enumerate(ordered)}
    assert all(at[parents[h]] < at[h] for h in hashes if parents[h] in at)
    grouped = families(shuffled, parents)
    assert sorted(h for family in grouped.values() for h in family) == sorted(hashes)
    for root, family in grouped.items():
        assert family[0] == root
        assert parents[root] not in at
        assert all(parents[h] in family for h in family[1:])


def test_a_forged_cycle_loses_no_block() -> None:
    x, y, z = (BlockHash(bytes([i]) * 16) for i in range(3))
    assert sorted(prefix_first([x, y, z], {x: y, y: z, z: x})) == [x, y, z]
    grouped = families([x, y, z], {x: y, y: z, z: x})
    assert sorted(h for family in grouped.values() for h in family) == [x, y, z]
