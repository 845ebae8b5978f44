"""What must hold of a store node's tiers, pins and generations: books kept beside those of :mod:`sim.checker`."""

import asyncio
import ctypes
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvstore.node.node import StoreNode
from sim.checker import Findings
from sim.slot_checker import Truth
from sim.storage import SimDevice
from tracehaul.rpc.base import CallContext
from tracehaul.runtime import clock
from tracehaul.wire.blocks import DrainState, Lease, Leased, PinKind, Release
from tracehaul.wire.hashing import checksum
from tracehaul.wire.ids import BlockHash, TraceId

PROBE_ATTEMPTS = 40
PROBE_PAUSE_S = 0.1


class TierChecker:
    """Nothing that was published below memory is lost by a death, and what is visible can be had or is counted."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings

    def recovered(self, process: str, promised: Iterable[BlockHash], node: StoreNode) -> None:
        """A new life has taken over a device on which these blocks are whole, as its bytes say."""
        assert node.tiering is not None
        missing = [block_hash for block_hash in promised if node.tiering.tier.find(block_hash) is None]
        if missing:
            self._findings.add(
                "lost", f"{process}: {len(missing)} blocks were on its device and are not there any more"
            )

    def missed(self, process: str, node: StoreNode, request: Lease, reply: Leased, before: "Excuses") -> None:
        """A lease was answered. What memory has must be in it; what the tier has, or the miss be counted."""
        tiering = node.tiering
        gone = [h for h, block in zip(request.hashes, reply.blocks, strict=True) if block is None]
        in_memory = node.arena.exists(gone)
        if 1 in in_memory:
            self._findings.add("visible", f"{process}: {sum(in_memory)} blocks in memory were not leased")
        if node.stats.missed_blocks - before.missed < len(gone):
            self._findings.add("visible", f"{process}: {len(gone)} misses are not counted")
        if tiering is not None:
            below = sum(tiering.tier.find(h) is not None for h in gone)
            if below and excuses(node).tier <= before.tier:
                self._findings.add(
                    "visible", f"{process}: {below} blocks of the tier were not leased, without a reason"
                )

    async def probe(
        self, process: str, node: StoreNode, buffer: memoryview, truth: Truth, rotten: set[BlockHash]
    ) -> None:
        """At rest: every visible block is leased and right, or found bad and gone."""
        for block_hash in (node.tiering or node.arena).published():
            bad = excuses(node).bad
            for _ in range(PROBE_ATTEMPTS):
                if await self._lease(process, node, buffer, block_hash, truth, rotten) or excuses(node).bad > bad:
                    break
                if _only_its_prefix(node, block_hash):
                    break  # a sequence as long as the arena: what comes before it must not make room for it
                await asyncio.sleep(PROBE_PAUSE_S)
            else:
                self._findings.add("visible", f"{process}: {block_hash.hex()} is visible and cannot be leased at rest")

    async def _lease(
        self,
        process: str,
        node: StoreNode,
        buffer: memoryview,
        block_hash: BlockHash,
        truth: Truth,
        rotten: set[BlockHash],
    ) -> bool:
        context = CallContext(peer="probe")
        leased = await node.call(Lease((block_hash,), 5.0), context)
        assert isinstance(leased, Leased)
        (block,) = leased.blocks
        if block is not None and block_hash not in rotten:
            data = bytes(buffer[block.offset : block.offset + block.size_bytes])
            expected = truth.block(block_hash)
            if checksum(data) != block.checksum or (expected is not None and data != expected):
                self._findings.add("torn", f"{process}: {block_hash.hex()} is leased with wrong bytes at rest")
        await node.call(Release(leased.lease), context)
        return block is not None


def _only_its_prefix(node: StoreNode, block_hash: BlockHash) -> bool:
    """Whether everything that may make room for it, by its tenant's quota, is what it continues."""
    assert node.tiering is not None
    below = node.tiering.tier.find(block_hash)
    if below is None:
        return False
    arena = node.arena
    prefix = set(arena.table.continuations.ancestry(below.parent))
    tenants, groups = arena.table.tenants, arena.table.group
    yielding = set(tenants.yielding(tenants.group(below.tenant)))
    slots = arena.table.published
    return all(held in prefix for held, slot in slots.items() if groups[slot] in yielding)


class DrainChecker:
    """A node that says that it is drained can be switched off: all that it has is elsewhere, or counted as lost."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self.drained = 0
        self.moved_blocks = 0

    def done(self, process: str, node: StoreNode, others: Sequence[StoreNode], state: DrainState) -> None:
        """It says so now."""
        self.drained += 1
        self.moved_blocks += state.blocks_moved
        visible = (node.tiering or node.arena).published()
        found = [(other.tiering or other.arena).exists(visible) for other in others]
        missing = sum(not any(there) for there in zip(*found, strict=True)) if found else len(visible)
        if missing > state.blocks_lost:
            self._findings.add("drain", f"{process}: drained, and {missing} of {len(visible)} blocks are nowhere else")


class Excuses(NamedTuple):
    """Counts of what may cost a block that was there."""

    missed: int
    """Misses that the node has counted."""
    tier: int
    """Blocks of the tier that did not come up, and leases that did not wait."""
    bad: int
    """Blocks dropped because their bytes were wrong, or their device did not give them."""


def excuses(node: StoreNode) -> Excuses:
    """As of now."""
    bad = node.stats.corrupt_held
    below = 0
    if node.tiering is not None:
        moved, tier = node.tiering.stats, node.tiering.tier.stats
        bad += tier.corrupt + tier.failed
        below = moved.promote_refused + moved.promote_failed + moved.promote_late
    return Excuses(node.stats.missed_blocks, below + bad, bad)


PinKey = tuple[str, str, TraceId]
"""Process, tenant, trace."""


class _HardPin(NamedTuple):
    until_s: float
    hashes: tuple[BlockHash, ...]


class PinChecker:
    """A hard pin holds what is there until it ends; only the node's death or a bad byte takes that away.

    Knows of pins what the one who pins knows: what was asked for and granted.
    """

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._pins: dict[PinKey, _HardPin] = {}
        self._asked: dict[PinKey, int] = {}
        self._seen: dict[tuple[PinKey, BlockHash], None] = {}
        self._bad: dict[str, int] = {}
        self._softened: dict[str, int] = {}
        self._user: dict[SimDevice, str] = {}
        self._lost_power: dict[SimDevice, int] = {}
        self._fleet: dict[tuple[str, TraceId], _HardPin] = {}
        self._holders: dict[BlockHash, int] = {}
        self.replicated = 0
        """Blocks seen on two nodes under a hard pin, over all audits."""
        self.wanted: dict[BlockHash, None] = {}
        """Blocks that were ever under a hard pin."""
        self.recovered = 0
        """Hard pins found again after a restart."""
        self.held = 0
        """Blocks seen under a hard pin, over all audits: to see that it looked at something."""

    def asking(self, key: PinKey, kind: PinKind, until_s: float) -> int:
        """Somebody is about to pin it: from now on it may end by then. Returns a number for :meth:`granted`."""
        known = self._pins.get(key)
        if known is not None and kind == "hard":
            self._pins[key] = _HardPin(min(known.until_s, until_s), known.hashes)
        elif known is not None:
            self._forget(key)
        self._asked[key] = self._asked.get(key, 0) + 1
        return self._asked[key]

    def granted(self, key: PinKey, number: int, until_s: float, hashes: Sequence[BlockHash]) -> None:
        """A hard pin was granted that lasts at least until then."""
        if self._asked.get(key) != number:
            return  # something else has been asked for since: what it is now is not known
        known = self._pins.get(key)
        if known is not None and known.until_s <= clock.now_s():  # this one does not add to it: it had ended
            self._forget(key)
            known = None
        both = dict.fromkeys((*(known.hashes if known is not None else ()), *hashes))
        self._pins[key] = _HardPin(until_s, tuple(both))

    def ended(self, key: PinKey) -> None:
        """Somebody is about to unpin it, or it is not known what became of a call."""
        self._asked[key] = self._asked.get(key, 0) + 1
        self._forget(key)

    def _forget(self, key: PinKey) -> None:
        self._pins.pop(key, None)
        self._seen = {seen: None for seen in self._seen if seen[0] != key}

    def fleet_pinned(self, key: tuple[str, TraceId], until_s: float, hashes: Sequence[BlockHash]) -> None:
        """A node has granted a hard pin with copies, which lasts at least until then wherever it is copied to."""
        known = self._fleet.get(key)
        both = dict.fromkeys((*(known.hashes if known is not None else ()), *hashes))
        self._fleet[key] = _HardPin(until_s, tuple(both))

    def fleet_ended(self, key: tuple[str, TraceId]) -> None:
        """Somebody is about to unpin it."""
        self._fleet.pop(key, None)

    def _let_go_softened(self, process: str, node: StoreNode) -> None:
        """A hard pin that outgrew its limits is soft: it promises nothing more. The node counts those."""
        softened = node.arena.softened - self._softened.get(process, 0)
        self._softened[process] = node.arena.softened
        for key in [key for key in self._pins if key[0] == process]:
            held = node.arena.pin_of((key[1], key[2]))
            if softened and held is not None and held.kind == "soft":
                softened -= 1
                self._forget(key)

    def audit_fleet(self, nodes: Sequence[StoreNode]) -> None:
        """Of pins that ask for copies: what two live nodes had is not gone with one. Only where one dies at a time."""
        now_s = clock.now_s()
        wanted: dict[BlockHash, None] = {}
        for pin in self._fleet.values():
            if pin.until_s > now_s:
                wanted.update(dict.fromkeys(pin.hashes))
        holders = dict.fromkeys(wanted, 0)
        for node in nodes:
            held = (node.tiering or node.arena).exists(tuple(wanted))
            for block_hash, there in zip(wanted, held, strict=True):
                holders[block_hash] += there
        gone = [h for h, count in holders.items() if count == 0 and self._holders.get(h, 0) > 1]
        if gone:
            self._findings.add("replicas", f"{len(gone)} pinned blocks that two nodes had are on none")
        self.replicated += sum(count > 1 for count in holders.values())
        self.wanted.update(wanted)
        self._holders = holders

    def restarted(self, device: SimDevice, process: str, node: StoreNode) -> None:
        """A life has taken over a device: the pins that its former user promised are in force."""
        former = self._user.get(device)
        self._user[device] = process
        if former is None:
            return
        lost_power, self._lost_power[device] = self._lost_power.get(device, 0), device.lost_power
        now_s = clock.now_s()
        listed = {(pin.tenant, pin.trace): pin for pin in node.arena.list_pins(None, now_s)}
        for key in [key for key in self._pins if key[0] == former]:
            promised = self._pins[key]
            self.ended(key)
            found = listed.get((key[1], key[2]))
            if found is not None and found.kind == "hard" and found.blocks >= len(promised.hashes):
                self._pins[process, key[1], key[2]] = promised
                self.recovered += 1
            elif promised.until_s > now_s and lost_power == device.lost_power:  # power takes the last second's
                self._findings.add("pins", f"{process}: {key[2]} was pinned and is not, after a restart: {found}")

    def audit(self, process: str, node: StoreNode) -> None:
        """Look whether everything that was there last time still is. Call it often, and only while the node lives."""
        now_s = clock.now_s()
        for key in [key for key, pin in self._pins.items() if key[0] == process and pin.until_s <= now_s]:
            self._forget(key)
        self._let_go_softened(process, node)
        bad = excuses(node).bad
        excused = bad - self._bad.get(process, 0)
        self._bad[process] = bad
        lost: set[BlockHash] = set()
        for key, pin in self._pins.items():
            if key[0] != process:
                continue
            held = (node.tiering or node.arena).exists(pin.hashes)
            for block_hash, there in zip(pin.hashes, held, strict=True):
                if there:
                    self._seen[key, block_hash] = None
                    self.held += 1
                elif self._seen.pop((key, block_hash), 0) is None:
                    lost.add(block_hash)
        if len(lost) > excused:
            self._findings.add("pins", f"{process}: {len(lost)} blocks under hard pins are gone")


def offset_in(buffer: memoryview, view: memoryview) -> int | None:
    """Where ``view`` is in ``buffer``; None if it is not."""
    at = _address(view) - _address(buffer)
    return at if 0 <= at < buffer.nbytes else None


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
