"""Which pins want copies on other nodes, who sees to them, and who takes them. Pure: the shell copies and tells time.

Every node that has a pin knows its *holders*, the *lead* first: the one that the router told last. The lead copies what
the pin covers to the others; when it is lost the next in the list is the lead. What nodes know of each other is soft:
two that both take themselves for the lead copy twice, which the receiver answers with "present".

Copies are made on the first nodes in the trace's rendezvous order, as its home is: so the router, when it looks for a
new home, finds the copies there. A set that has its copies is left alone, whoever joins.

A node that is gone has ``grace_s`` to come back in the same life before its copies count as lost, and one that joined
gets copies once it has stayed for half of that: a node that comes and goes costs one rebuilding, and not at itself.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from kvstore.index.pins import PinKey
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.hashing import by_weight
from tracehaul.wire.ids import BlockHash, Generation, NodeId

RETRY_MIN_S = 0.5
RETRY_MAX_S = 30.0
"""Pauses before a node that did not take a pin's copies is tried again; they double."""


class ReplicaSet(NamedTuple):
    """One pin's copies, as this node knows them."""

    replicas: int
    holders: tuple[NodeId, ...]
    """The lead first."""


class CopyPlan(NamedTuple):
    """What the lead of a set is to do now."""

    holders: tuple[NodeId, ...]
    """As they will be when all targets have taken it, this node first."""
    targets: tuple[NodeId, ...]
    """Who gets the pin and what it lacks of the blocks, in this order."""
    everything: bool
    """All that is held of the pin must be compared; otherwise only ``fresh`` is new."""
    fresh: tuple[BlockHash, ...]


class _Retry(NamedTuple):
    at_s: float | None
    """None: now."""
    pause_s: float


class KnownNodes:
    """The other store nodes as this one is told of them: who lives, since when, and who was lost when."""

    def __init__(self, node: NodeId, grace_s: float) -> None:
        self._node = node
        self._grace_s = grace_s
        self._lives: dict[NodeId, Generation] = {}
        self._since_s: dict[NodeId, float] = {}
        self._lost_life: dict[NodeId, tuple[Generation | None, float]] = {}  # and when; None: never seen
        self._draining: frozenset[NodeId] = frozenset()
        self._told = False

    def set(self, nodes: Iterable[NodeInfo], draining: Collection[NodeId], now_s: float) -> list[NodeId]:
        """Take in the membership; returns who is back in the life that it had."""
        lives = {info.node: info.generation for info in nodes if info.role == "store" and info.node != self._node}
        back: list[NodeId] = []
        for node, generation in self._lives.items():
            if lives.get(node) != generation and node not in self._lost_life:
                self._lost_life[node] = generation, now_s
        for node, generation in lives.items():
            if self._lives.get(node) != generation:
                # Of those that were there before us nobody knows how long.
                self._since_s[node] = now_s if self._told else now_s - self._grace_s
            if node in self._lost_life and self._lost_life[node][0] in (generation, None):
                del self._lost_life[node]
                self._since_s[node] = now_s - self._grace_s
                back.append(node)
        self._lives, self._draining, self._told = lives, frozenset(draining), True
        return back

    def heard_of(self, node: NodeId, now_s: float) -> None:
        """Another node says that this one has copies: if it is no member, it has its time to become one."""
        if node not in self._lives and node not in self._lost_life and node != self._node:
            self._lost_life[node] = None, now_s

    def expired(self, now_s: float) -> list[NodeId]:
        """Nodes whose lost life had its time to come back; each is named once."""
        gone = [node for node, (_, lost_s) in self._lost_life.items() if lost_s + self._grace_s <= now_s]
        for node in gone:
            del self._lost_life[node]
        return gone

    def deadline_s(self, now_s: float) -> float | None:
        """When the next life is given up, or the next node has stayed long enough."""
        settles = [self._settles_s(node) for node in self._lives]
        given_up = [lost_s + self._grace_s for _, lost_s in self._lost_life.values()]
        return min([at_s for at_s in (*settles, *given_up) if at_s > now_s], default=None)

    def serves(self, node: NodeId) -> bool:
        """Whether it lives, in the life that took its copies."""
        return node in self._lives and node not in self._lost_life

    def is_draining(self, node: NodeId) -> bool:
        """Whether it is about to leave."""
        return node in self._draining

    def takers(self, key: str, now_s: float | None) -> list[NodeId]:
        """Who may be given copies, best first; with ``now_s`` only those that have stayed for a while."""
        able = [node for node in self._lives if self.serves(node) or now_s is None]
        able = [node for node in able if node not in self._draining]
        return by_weight([node for node in able if now_s is None or self._settles_s(node) <= now_s], key)

    def _settles_s(self, node: NodeId) -> float:
        return self._since_s[node] + self._grace_s / 2


class Replicas:
    """The sets of one node's pins, and which of them need it to act."""

    def __init__(self, node: NodeId, grace_s: float) -> None:
        self._node = node
        self.known_nodes = KnownNodes(node, grace_s)
        self._sets: dict[PinKey, ReplicaSet] = {}
        self._dirty: dict[PinKey, bool] = {}  # whether all of it must be compared
        self._fresh: dict[PinKey, dict[BlockHash, None]] = {}
        self._short: dict[PinKey, None] = {}
        self._refused: dict[PinKey, dict[NodeId, _Retry]] = {}

    def __len__(self) -> int:
        return len(self._sets)

    def __iter__(self) -> Iterator[PinKey]:
        return iter(self._sets)

    def __contains__(self, key: PinKey) -> bool:
        return key in self._sets

    @property
    def short(self) -> int:
        """Sets that this node leads and that lack copies, as there is nobody to take them."""
        return len(self._short)

    @property
    def waiting(self) -> int:
        """Sets that this node has yet to look at."""
        return len(self._dirty)

    def get(self, key: PinKey) -> ReplicaSet | None:
        """What is known of a pin's copies; None if it wants one only."""
        return self._sets.get(key)

    # --- what happens -------------------------------------------------------------------------------------

    def pinned(self, key: PinKey, replicas: int, holders: Sequence[NodeId], now_s: float) -> None:
        """A pin came: from the router (no ``holders``), which makes this node its lead; or from its lead."""
        known = self._sets.get(key)
        if replicas <= 1 and len(holders) <= 1:
            if known is not None and replicas <= 1:
                self.ended(key)
            return
        if not holders:
            others = known.holders if known is not None else ()
            holders = (self._node, *(node for node in others if node != self._node))
        elif known is not None and known.holders[0] == self._node and self._outranks(holders[0], key):
            # Two leads, each told by a router or left by a restart: the same one gives way, whose word crosses whose.
            holders = (self._node, *(node for node in (*known.holders, *holders) if node != self._node))
        elif self._node not in holders:
            holders = (*holders, self._node)
        for node in holders:
            self.known_nodes.heard_of(node, now_s)
        self._sets[key] = ReplicaSet(replicas, tuple(dict.fromkeys(holders)))
        self._touch(key)

    def ended(self, key: PinKey) -> tuple[NodeId, ...]:
        """A pin is over; returns who must hear of it from this node: the others, if it is their lead."""
        known = self._sets.pop(key, None)
        for of in (self._dirty, self._fresh, self._short, self._refused):
            of.pop(key, None)
        return known.holders[1:] if known is not None and known.holders[0] == self._node else ()

    def published(self, key: PinKey, block_hash: BlockHash) -> None:
        """A block that the pin covers has arrived here."""
        if key in self._sets:
            self._dirty.setdefault(key, False)
            self._fresh.setdefault(key, {})[block_hash] = None

    def members(self, nodes: Iterable[NodeInfo], draining: Collection[NodeId], now_s: float) -> None:
        """The membership changed."""
        back = self.known_nodes.set(nodes, draining, now_s)
        for key, known in self._sets.items():
            missed = any(node in back for node in known.holders)
            leaving = any(self.known_nodes.is_draining(node) for node in known.holders)
            if missed or leaving or key in self._short:
                self._touch(key)

    def tick(self, now_s: float) -> dict[NodeId, int]:
        """Time has passed: give up lives that did not come back, and try again what was refused.

        Returns the nodes that were given up, and how many sets lost a copy with each.
        """
        lost: dict[NodeId, int] = {}
        for node in self.known_nodes.expired(now_s):
            lost[node] = 0
            for key, known in list(self._sets.items()):
                if node in known.holders and node != self._node:
                    holders = tuple([other for other in known.holders if other != node])
                    self._sets[key] = known._replace(holders=holders)
                    self._touch(key)
                    lost[node] += 1
        for key in self._short:
            if self._candidates(key, now_s):
                self._touch(key)
        for key, refused in self._refused.items():
            for node, retry in refused.items():
                if retry.at_s is not None and retry.at_s <= now_s:
                    refused[node] = retry._replace(at_s=None)
                    self._touch(key)
        return lost

    def deadline_s(self, now_s: float) -> float | None:
        """When :meth:`tick` next has something to do."""
        if not self._sets:
            return None
        retries = [retry.at_s for refused in self._refused.values() for retry in refused.values()]
        pending = [at_s for at_s in retries if at_s is not None]
        settled_s = self.known_nodes.deadline_s(now_s)
        return min([*pending, *([settled_s] if settled_s is not None else [])], default=None)

    def taken(self, key: PinKey, node: NodeId) -> None:
        """A target has the pin and its blocks."""
        known = self._sets.get(key)
        if known is not None and node not in known.holders:
            self._sets[key] = known._replace(holders=(*known.holders, node))
        refused = self._refused.get(key)
        if refused is not None and refused.pop(node, None) is not None and not refused:
            del self._refused[key]

    def refused(self, key: PinKey, node: NodeId, now_s: float, *, full: bool) -> None:
        """A target did not take all of it: another one will be asked if there is one, and this one later.

        One that is full is no holder, whatever it had; one that did not answer may be.
        """
        if key not in self._sets:
            return
        before = self._refused.setdefault(key, {}).get(node)
        pause_s = RETRY_MIN_S if before is None else min(2 * before.pause_s, RETRY_MAX_S)
        self._refused[key][node] = _Retry(now_s + pause_s, pause_s)
        if full:
            known = self._sets[key]
            self._sets[key] = known._replace(holders=tuple([other for other in known.holders if other != node]))
        if self._candidates(key, now_s):
            self._touch(key)

    # --- what is to be done -------------------------------------------------------------------------------

    def next(self, now_s: float) -> tuple[PinKey, CopyPlan] | None:
        """The next set that this node must act for, and how; each is named once for each thing that happened."""
        while self._dirty:
            key = next(iter(self._dirty))
            everything = self._dirty.pop(key)
            fresh = tuple(self._fresh.pop(key, ()))
            plan = self._plan(key, everything, fresh, now_s)
            if plan is not None:
                return key, plan
        return None

    def _plan(self, key: PinKey, everything: bool, fresh: tuple[BlockHash, ...], now_s: float) -> CopyPlan | None:
        known = self._sets[key]
        self._short.pop(key, None)
        if self._lead(known) != self._node:
            return None
        others = [node for node in known.holders if node != self._node and not self.known_nodes.is_draining(node)]
        candidates = self._candidates(key, now_s)
        chosen = candidates[: max(0, known.replicas - 1 - len(others))]
        holders = (self._node, *others, *chosen)
        if len(holders) < known.replicas:
            self._short[key] = None
        # One that is away may come back with what it had.
        targets = [node for node in (*others, *chosen) if self.known_nodes.serves(node)]
        targets = [node for node in targets if not self._is_pausing(key, node)]
        return CopyPlan(holders, tuple(targets), everything or bool(chosen), fresh) if targets else None

    def _candidates(self, key: PinKey, now_s: float) -> list[NodeId]:
        """Who could take one copy more, best first."""
        known = self._sets[key]
        takers = self.known_nodes.takers(key[1], now_s)
        return [node for node in takers if node not in known.holders and not self._is_pausing(key, node)]

    def _is_pausing(self, key: PinKey, node: NodeId) -> bool:
        retry = self._refused.get(key, {}).get(node)
        return retry is not None and retry.at_s is not None

    def _outranks(self, other: NodeId, key: PinKey) -> bool:
        return by_weight((self._node, other), key[1])[0] == self._node

    def _lead(self, known: ReplicaSet) -> NodeId | None:
        """The first holder that stays. One that is away has its time to come back."""
        return next((node for node in known.holders if not self.known_nodes.is_draining(node)), None)

    def _touch(self, key: PinKey) -> None:
        self._dirty[key] = True


def prefix_first(hashes: Iterable[BlockHash], parents: Mapping[BlockHash, BlockHash]) -> list[BlockHash]:
    """``hashes`` so that each follows its parent where that is among them, else in the order given.

    Chains without a cycle are assumed; a forged cycle loses no block, only the order.
    """
    wanted = dict.fromkeys(hashes)
    done: dict[BlockHash, None] = {}
    for block_hash in wanted:
        path: dict[BlockHash, None] = {}
        at: BlockHash | None = block_hash
        while at is not None and at in wanted and at not in done and at not in path:
            path[at] = None
            at = parents.get(at)
        done.update(dict.fromkeys(reversed(path)))
    return list(done)


def families(hashes: Sequence[BlockHash], parents: Mapping[BlockHash, BlockHash]) -> dict[BlockHash, list[BlockHash]]:
    """Blocks by the first of their ancestors that is among them, each family prefix first."""
    roots: dict[BlockHash, BlockHash] = {}
    found: dict[BlockHash, list[BlockHash]] = {}
    for block_hash in prefix_first(hashes, parents):
        root = roots.get(parents[block_hash], block_hash) if block_hash in parents else block_hash
        roots[block_hash] = root
        found.setdefault(root, []).append(block_hash)
    return found
