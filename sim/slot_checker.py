"""What must hold of a store's slots in every run: a ledger beside the store's own, and the bytes that must be there."""

from collections.abc import Sequence
from typing import NamedTuple

from kvstore.node.node import StoreNode
from sim.checker import Findings
from tracehaul.engine.fake import TrueState, pack_rows
from tracehaul.runtime import clock
from tracehaul.wire.blocks import Leased, Publish, Published, Reserved, Slot
from tracehaul.wire.hashing import KVLayout, checksum, next_hash, pack_tokens
from tracehaul.wire.ids import BlockHash, LeaseId, SlotGeneration


class _Grant(NamedTuple):
    writer: str
    generation: SlotGeneration


class _Hold(NamedTuple):
    offsets: tuple[int, ...]
    until_s: float


class VisibleBlock(NamedTuple):
    """A published block in a store's memory."""

    hash: BlockHash
    offset: int
    size_bytes: int
    checksum: int


class SlotChecker:
    """Nothing is evicted or overwritten under a live lease; nothing is read that was not published.

    Keeps its own ledger of one store node's life, from the answers that the node gave.
    """

    def __init__(
        self,
        findings: Findings,
        store: str,
        node: StoreNode,
        buffer: memoryview,
        known: set[BlockHash] | None = None,
    ) -> None:
        """``known``: what may come up from a tier, whose slots have generations of their own; None without one."""
        self._findings = findings
        self._store = store
        self._known = known
        self._node = node
        self._buffer = buffer
        self._grants: dict[int, _Grant] = {}
        self._leases: dict[tuple[str, LeaseId], _Hold] = {}
        self._published: set[tuple[BlockHash, SlotGeneration]] = set()
        self._gone_peers: dict[str, float] = {}
        self.rotten: set[BlockHash] = set()
        """Blocks whose bytes a fault changed: their checksums may fail."""

    def reserved(self, peer: str, reply: Reserved) -> None:
        """The node gave ``peer`` slots to write."""
        for outcome in reply.outcomes:
            if not isinstance(outcome, Slot):
                continue
            for (holder, lease), hold in self._live().items():
                if outcome.offset in hold.offsets:
                    text = f"slot {outcome.offset} given to {peer} under lease {lease} of {holder}"
                    self._findings.add("lease", f"{self._store}: {text}")
            self._grants[outcome.offset] = _Grant(_process(peer), outcome.generation)

    def publishing(self, peer: str, request: Publish, reply: Published) -> None:
        """The node answered a publish."""
        for block, outcome in zip(request.blocks, reply.outcomes, strict=True):
            if outcome == "published":
                self._published.add((block.hash, block.generation))
                if self._known is not None:
                    self._known.add(block.hash)

    def leased(self, peer: str, hashes: Sequence[BlockHash], reply: Leased) -> None:
        """The node granted a lease."""
        offsets: list[int] = []
        for block_hash, block in zip(hashes, reply.blocks, strict=True):
            if block is None:
                continue
            offsets.append(block.offset)
            came_up = self._known is not None and block_hash in self._known
            if (block_hash, block.generation) not in self._published and not came_up:
                self._findings.add("publish", f"{self._store}: {block_hash.hex()} leased but never published")
            actual = checksum(self._buffer[block.offset : block.offset + block.size_bytes])
            if actual != block.checksum and block_hash not in self.rotten:
                self._findings.add("bytes", f"{self._store}: {block_hash.hex()} leased with wrong bytes in its slot")
        self._leases[peer, reply.lease] = _Hold(tuple(offsets), clock.now_s() + reply.ttl_s)

    def released(self, peer: str, lease: LeaseId) -> None:
        """The holder ended it."""
        self._leases.pop((peer, lease), None)

    def disconnected(self, peer: str) -> None:
        """The node lost that connection: what it held ends."""
        self._gone_peers[_process(peer)] = clock.now_s()
        for key in [key for key in self._leases if key[0] == peer]:
            del self._leases[key]

    def grants(self, writer: str, offsets: Sequence[int]) -> list[SlotGeneration | None]:
        """A write starts: under which reservations of this writer."""
        found = [self._grants.get(offset) for offset in offsets]
        return [grant.generation if grant is not None and grant.writer == writer else None for grant in found]

    def written(self, writer: str, offsets: Sequence[int], grants: Sequence[SlotGeneration | None]) -> None:
        """Bytes of a write that started under ``grants`` land now."""
        for offset, generation in zip(offsets, grants, strict=True):
            for (holder, lease), hold in self._live().items():
                if offset in hold.offsets:
                    text = f"{writer} wrote into slot {offset} under lease {lease} of {holder}"
                    self._findings.add("lease", f"{self._store}: {text}")
            grant = self._grants.get(offset)
            if generation is None or grant is None or grant.generation != generation:
                text = f"{writer} wrote into slot {offset} that was given to another meanwhile ({generation}, {grant})"
                self._findings.add("fence", f"{self._store}: {text}")

    def promoted(self, offset: int) -> None:
        """The node's tier writes into a slot now: no lease may cover it, and no earlier writer owns it any more."""
        self._grants.pop(offset, None)
        for (holder, lease), hold in self._live().items():
            if offset in hold.offsets:
                text = f"the tier wrote into slot {offset} under lease {lease} of {holder}"
                self._findings.add("lease", f"{self._store}: {text}")

    def reading(self, reader: str, offsets: Sequence[int]) -> None:
        """A read starts: a lease must cover it, unless the node lost the reader's connection and ended it."""
        held = {
            offset
            for (holder, _), hold in self._live().items()
            if _process(holder) == reader
            for offset in hold.offsets
        }
        if reader in self._gone_peers:
            return
        for offset in offsets:
            if offset not in held:
                self._findings.add("lease", f"{self._store}: {reader} reads slot {offset} without a lease")

    def contents(self, truth: "Truth") -> None:
        """Every published block has the bytes that were promised, and those of its tokens where they are known."""
        for block in self.visible():
            data = bytes(self._buffer[block.offset : block.offset + block.size_bytes])
            if block.hash in self.rotten:
                continue
            if checksum(data) != block.checksum:
                self._findings.add("bytes", f"{self._store}: {block.hash.hex()} does not match its checksum")
            expected = truth.block(block.hash)
            if expected is not None and data != expected:
                self._findings.add("bytes", f"{self._store}: {block.hash.hex()} is not the KV of its tokens")

    def visible(self) -> list["VisibleBlock"]:
        """Every visible block; read from behind, since no message says it all."""
        arena = self._node.arena
        slot_bytes = arena.config.slot_bytes
        sizes, sums = arena.table.size, arena.table.checksum
        slots = arena.table.published
        return [VisibleBlock(block, slot * slot_bytes, sizes[slot], sums[slot]) for block, slot in slots.items()]

    def _live(self) -> dict[tuple[str, LeaseId], _Hold]:
        now_s = clock.now_s()
        return {key: hold for key, hold in self._leases.items() if hold.until_s > now_s}


def _process(peer: str) -> str:
    """The node's address in a connection's name."""
    return peer.rpartition("#")[0]


class Truth:
    """KV bytes by block hash, of everything that clients know; computed without any cluster."""

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout
        self._blocks: dict[BlockHash, tuple[TrueState, int, int]] = {}

    def add(self, salt: str, state: TrueState) -> None:
        """Learn all full and partial blocks of one sequence."""
        parent = self._layout.root(salt)
        size = self._layout.block_tokens
        for start in range(0, len(state.tokens), size):
            for end in range(start + 1, min(start + size, len(state.tokens)) + 1):
                block = next_hash(parent, pack_tokens(state.tokens[start:end]))
                self._blocks.setdefault(block, (state, start, end))
                if end == start + size:
                    parent = block

    def block(self, block_hash: BlockHash) -> bytes | None:
        """Its packed bytes; None if no client knows its tokens."""
        known = self._blocks.get(block_hash)
        if known is None:
            return None
        state, start, end = known
        return pack_rows(self._layout, state.kv[start:end])
