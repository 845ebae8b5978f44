"""Moving all that a node holds to others before it leaves.

A drain goes in rounds over what is still only here. First the pins: what one covers goes to another node that has the
pin, else to the trace's next home, and the pin follows. Then the rest, by families: each goes where the nearest of its
ancestors went, else by rendezvous over the first of them. Families that are in memory come first, those that have to
come up from the slower tier after them, as these may push others out; within a family the prefix comes first.

A receiver that is dead, frozen or full is passed over for the rest of the round. What is left then is tried again
after a pause, and at once when the membership changes: the loss of a node that took blocks makes them left again. In
the end every receiver is asked whether it still has what it took. What it has not is moved once more; what is gone
again then is counted as lost, as nodes that are short of memory would throw out each other's blocks for ever.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.client.nodes import StoreNodes
from kvstore.copies.copier import Copier, Holdings
from kvstore.copies.replicas import KnownNodes, families
from kvstore.copies.replicator import PIN_TIMEOUT_S, Replicator, travelling
from kvstore.index.pins import HeldPin, PinKey
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.wire.blocks import Drain, DrainState, Pinned
from tracehaul.wire.errors import ClusterError, Overloaded, Unavailable
from tracehaul.wire.ids import BlockHash, NodeId

log = Log(__name__)

PAUSE_MIN_S = 0.5
PAUSE_MAX_S = 10.0
"""Between rounds that left something; they double."""
ASK_BLOCKS = 4096
"""Asked for at once whether the other node has them."""


class _Moved(NamedTuple):
    node: NodeId
    size_bytes: int


class Drainer:
    """Of one node. :meth:`run` must run beside it; costs nothing while nobody asks for a drain."""

    def __init__(
        self,
        known_nodes: KnownNodes,
        holdings: Holdings,
        copier: Copier,
        nodes: StoreNodes,
        replicator: Replicator,
        half_life_s: float,
    ) -> None:
        self._known_nodes = known_nodes
        self._holdings = holdings
        self._copier = copier
        self._nodes = nodes
        self._replicator = replicator
        self._half_life_s = half_life_s
        self._begun = asyncio.Event()
        self._wake = asyncio.Event()
        self._round: asyncio.Task[None] | None = None
        self._forget()

    def _forget(self) -> None:
        self._moved: dict[BlockHash, _Moved] = {}
        self._again: dict[BlockHash, NodeId] = {}
        self._given_up: set[BlockHash] = set()
        self._full: set[NodeId] = set()
        self._takers = frozenset(self._known_nodes.takers("", None))
        self._pins: dict[PinKey, tuple[HeldPin, NodeId]] = {}
        self._passed_over: dict[NodeId, str] = {}
        self._pins_refused: dict[NodeId, str] = {}
        self._pins_dropped: dict[PinKey, HeldPin] = {}
        """Soft ones that nobody takes, as theirs are enough: they promise nothing, so they hold nothing up."""
        self._blocks_moved = 0
        self._bytes_moved = 0
        self._lost = 0
        self._held_up = ""
        self._drained = False
        self._left_count = 0

    @property
    def draining(self) -> bool:
        """Whether the node takes nothing new."""
        return self._begun.is_set()

    @property
    def left(self) -> int:
        """About how many blocks are only here."""
        return self._left_count

    # --- what happens -------------------------------------------------------------------------------------

    def call(self, request: Drain) -> DrainState:
        """Begin, go on, or end.

        Raises:
            Unavailable: there is no node that could take anything.
        """
        if request.cancel:
            if self.draining:
                log.info("drain cancelled", moved=self._blocks_moved, left=len(self._left()))
                self._begun.clear()
                self._wake.set()
                self._forget()
        elif not self.draining:
            if not self._known_nodes.takers("", None):
                raise Unavailable("no other store node lives that takes blocks: there is nowhere to drain to")
            self._forget()
            self._begun.set()
            log.info("drain begun", blocks=len(self._left()), pins=self._holdings.arena.pins)
        return self.state()

    def state(self) -> DrainState:
        """How far it is."""
        if not self.draining:
            return DrainState("serving")
        left = self._left()
        specs = [spec for spec in map(self._holdings.spec, left) if spec is not None]
        return DrainState(
            "drained" if self._drained else "draining",
            blocks_left=len(left),
            bytes_left=sum(spec.size_bytes for spec in specs),
            pins_left=len(self._pins_left()),
            blocks_moved=self._blocks_moved,
            bytes_moved=self._bytes_moved,
            blocks_lost=self._lost,
            held_up=self._held_up,
        )

    def set_members(self) -> None:
        """The membership changed, and is known."""
        if not self.draining:
            return
        for block_hash in [h for h, moved in self._moved.items() if not self._known_nodes.serves(moved.node)]:
            self._count(self._moved.pop(block_hash), -1)
            self._lost += self._holdings.spec(block_hash) is None
        takers = frozenset(self._known_nodes.takers("", None))
        if takers - self._takers:
            self._pins_dropped.clear()
            self._lost -= len(self._given_up)
            self._given_up.clear()
        self._takers = takers
        self._pins = {key: (held, node) for key, (held, node) in self._pins.items() if self._known_nodes.serves(node)}
        self._wake.set()

    def changed(self, removed: Sequence[BlockHash] = ()) -> None:
        """Blocks have come or gone, or pins."""
        if not self.draining:
            return
        for block_hash in removed:
            self._lost += block_hash not in self._moved and block_hash not in self._given_up
            self._given_up.discard(block_hash)
        self._wake.set()

    # --- what is done about it ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Move blocks whenever a drain is on, for as long as the node serves."""
        pause_s = PAUSE_MIN_S
        while True:
            await self._begun.wait()
            self._wake.clear()
            before = self._blocks_moved
            await self._move_all()
            if not self.draining:
                continue
            if await self._is_done():
                pause_s = PAUSE_MIN_S
                await self._wake.wait()
                continue
            pause_s = PAUSE_MIN_S if self._blocks_moved > before else min(2 * pause_s, PAUSE_MAX_S)
            try:
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _is_done(self) -> bool:
        done = not self._left() and not self._pins_left() and await self._is_all_there()
        if not self.draining:  # cancelled meanwhile: there is nothing to note any more
            return False
        left, pins = len(self._left()), len(self._pins_left())
        if done:
            self._held_up = ""
            if not self._drained:
                log.info("drained", blocks=self._blocks_moved, bytes=self._bytes_moved, lost=self._lost)
        else:
            refusals = sorted({**self._pins_refused, **self._passed_over}.items())
            reasons = ", ".join(f"{node}: {why}" for node, why in refusals)
            held_up = reasons or ("" if self._known_nodes.takers("", None) else "no other store node lives")
            if held_up and held_up != self._held_up:
                log.warning("drain held up", blocks_left=left, pins_left=pins, reason=held_up)
            self._held_up = held_up
        self._drained = done
        self._left_count = left
        return done

    async def _is_all_there(self) -> bool:
        """Whether all that was moved is where it was moved to; what is not is left again, or given up."""
        by_node: dict[NodeId, list[BlockHash]] = {}
        for block_hash, moved in self._moved.items():
            if self._holdings.spec(block_hash) is not None:
                by_node.setdefault(moved.node, []).append(block_hash)
        for node, hashes in by_node.items():
            for start in range(0, len(hashes), ASK_BLOCKS):
                view = self._copier.view(node)
                try:
                    gone = None if view is None else await self._copier.lacks(view, hashes[start : start + ASK_BLOCKS])
                except ClusterError:
                    gone = None
                if gone is None:
                    self._passed_over[node] = "it does not say what it has"
                    return False
                for block_hash in gone:
                    self._not_there(block_hash)
        return not self._left()

    def _not_there(self, block_hash: BlockHash) -> None:
        moved = self._moved.pop(block_hash, None)
        if moved is None:
            return
        self._count(moved, -1)
        if block_hash not in self._again:
            self._again[block_hash] = moved.node
        else:
            self._given_up.add(block_hash)
            self._lost += 1

    async def _move_all(self) -> None:
        self._passed_over, self._pins_refused = {}, {}
        for key, held in self._pins_left():
            if self.draining:
                await self._move_pin(key, held)
        before: tuple[int, int] | None = None
        # Until all is moved, or everybody is passed over for what is left.
        while self.draining and before != (self._blocks_moved, len(self._passed_over)):
            before = self._blocks_moved, len(self._passed_over)
            for node, hashes in self._assigned().items():
                await self._move(node, hashes)

    def _assigned(self) -> dict[NodeId, list[BlockHash]]:
        """Who is to take what is left, whole families, in the order to move them."""
        left = self._left()
        self._left_count = len(left)
        specs = {spec.hash: spec for spec in map(self._holdings.spec, left) if spec is not None}
        by_root = families(list(specs), {block_hash: spec.parent for block_hash, spec in specs.items()})

        def comes_up(root: BlockHash) -> bool:
            return not all(map(self._holdings.in_memory, by_root[root]))

        by_node: dict[NodeId, list[BlockHash]] = {}
        for root in sorted(by_root, key=comes_up):
            takers = [node for node in self._known_nodes.takers(root.hex(), None) if node not in self._passed_over]
            if not takers:
                continue
            before = self._moved.get(specs[root].parent)
            thrown_out = self._again.get(root)
            node = next((node for node in takers if node != thrown_out), takers[0])
            if before is not None and before.node in takers and before.node != thrown_out:
                node = before.node
            by_node.setdefault(node, []).extend(by_root[root])
        return by_node

    async def _move_pin(self, key: PinKey, held: HeldPin) -> None:
        """A pin, then what it covers, to the first that takes both."""
        known = self._replicator.sets.get(key)
        holders = known.holders if known is not None else ()
        replicas = known.replicas if known is not None else 1
        takers = self._known_nodes.takers(key[1], None)
        refusals = 0
        others = [node for node in holders if node in takers]
        for node in (*others, *(node for node in takers if node not in others)):
            view = self._copier.view(node)
            if node in self._passed_over or view is None:
                continue
            now_holders = (node, *(other for other in others if other != node))
            pin = travelling(key, held, replicas, now_holders, clock.now_s(), self._half_life_s)
            try:
                if pin is not None:  # otherwise it is about to end
                    await self._nodes.call(view, pin, Pinned, PIN_TIMEOUT_S)
            except ClusterError as error:
                refusals += isinstance(error, Overloaded)
                self._pins_refused[node] = str(error)
                continue
            here = self._replicator.in_order(tuple(held.hashes))
            if await self._move(node, here):
                self._pins[key] = held, node
                return
        if held.kind == "soft" and takers and refusals == len(takers):
            self._pins_dropped[key] = held

    async def _move(self, node: NodeId, hashes: Sequence[BlockHash]) -> bool:
        """Copy what the node lacks; whether it has all of it that is still here."""
        for start in range(0, len(hashes), ASK_BLOCKS):
            asked = hashes[start : start + ASK_BLOCKS]
            view = self._copier.view(node)
            if view is None:
                self._passed_over[node] = "it is left alone for a moment"
                return False
            try:
                lacking = dict.fromkeys(await self._copier.lacks(view, asked))
            except ClusterError as error:
                self._passed_over[node] = str(error)
                return False
            for block_hash in asked:
                if block_hash not in lacking:
                    self._enter(block_hash, node)
            wanted = list(lacking)
            parts = [*self._copier.parts(wanted)]
            if node in self._full and wanted:  # one block will tell, and throws nothing out for what cannot follow
                parts = [wanted[:1], *self._copier.parts(wanted[1:])]
            for part in parts:
                if not self.draining:
                    return False
                outcomes = await self._copier.copy(view, part)
                for block_hash, outcome in zip(part, outcomes, strict=True):
                    if outcome in ("copied", "present"):
                        self._enter(block_hash, node)
                    elif outcome in ("full", "failed"):
                        self._passed_over[node] = "it has no room" if outcome == "full" else "copies did not get there"
                self._full.discard(node)
                if "full" in outcomes:
                    self._full.add(node)
                if node in self._passed_over:
                    return False
        return True

    # --- the books ----------------------------------------------------------------------------------------

    def _enter(self, block_hash: BlockHash, node: NodeId) -> None:
        spec = self._holdings.spec(block_hash)
        before = self._moved.get(block_hash)
        if before is None and self.draining:
            moved = self._moved[block_hash] = _Moved(node, 0 if spec is None else spec.size_bytes)
            self._count(moved, 1)
            self._left_count = max(0, self._left_count - 1)

    def _count(self, moved: _Moved, sign: int) -> None:
        self._blocks_moved += sign
        self._bytes_moved += sign * moved.size_bytes

    def _left(self) -> list[BlockHash]:
        moved, given_up = self._moved, self._given_up
        return [h for h in self._holdings.visible() if h not in moved and h not in given_up]

    def _pins_left(self) -> list[tuple[PinKey, HeldPin]]:
        """Those that nobody took as they are now; one that was renewed or has grown is taken anew."""
        pins = self._holdings.arena.open_pins(clock.now_s())
        self._holdings.settle()
        moved, dropped = self._pins, self._pins_dropped
        return [
            (key, held)
            for key, held in pins
            if not (key in moved and moved[key][0] is held) and dropped.get(key) is not held
        ]
