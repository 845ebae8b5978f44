"""A scrub that somebody asked for: every block of every tier is verified now, at half of full speed at most."""

import asyncio
import mmap
from collections.abc import Callable, Sequence
from typing import Literal

from kvstore.client.moves import checksums
from kvstore.index.arena import Arena
from kvstore.tiers.base import Tier
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import Offload
from tracehaul.wire.blocks import LeasedBlock
from tracehaul.wire.ids import BlockHash
from tracehaul.wire.operations import ScrubbedTier, ScrubState

log = Log(__name__)

SCRUB_HOLDER = "\0scrub"
"""Holder of what is being verified: no connection has this name."""
HOLD_S = 60.0
PART_BYTES = 4 << 20
"""Verified in memory between two rests."""
RESTS = 1.0
"""Rest for so many times as long as the last part took."""


class _Tier:
    def __init__(self, name: str, blocks: int) -> None:
        self.name = name
        self.blocks = blocks
        self.checked = 0
        self.bad = 0


class Scrubber:
    """At most one scrub of one node at a time.

    ``tiers`` are those below the arena. ``settle`` must follow every change of the arena made here; ``on_bad`` is told
    of each bad block in memory.
    """

    def __init__(
        self,
        arena: Arena,
        buffer: memoryview,
        slot_bytes: int,
        offload: Offload,
        tiers: Sequence[Tier],
        settle: Callable[[], None],
        on_bad: Callable[[BlockHash], None],
    ) -> None:
        self._arena = arena
        self._buffer = buffer
        self._slot_bytes = slot_bytes
        self._offload = offload
        self._below = tuple(tiers)
        self._settle = settle
        self._on_bad = on_bad
        self._job = 0
        self._state: Literal["running", "done", "cancelled"] = "done"
        self._tiers: list[_Tier] = []
        self._task: asyncio.Task[None] | None = None
        self.checked = 0
        """Blocks in memory verified since the node's start."""

    def start(self) -> ScrubState:
        """Begin one, unless one runs."""
        if self._task is None or self._task.done():
            self._job += 1
            self._state = "running"
            self._tiers = [_Tier("memory", len(self._arena))]
            self._tiers += [_Tier(tier.name, len(tier)) for tier in self._below]
            self._task = asyncio.get_running_loop().create_task(self._run(), name="scrub")
        return self.poll(self._job)

    def poll(self, job: int) -> ScrubState:
        """How far it is."""
        if job != self._job or not job:
            return ScrubState(job, "unknown")
        tiers = [ScrubbedTier(tier.name, tier.blocks, tier.checked, tier.bad) for tier in self._tiers]
        return ScrubState(job, self._state, tuple(tiers))

    def cancel(self, job: int) -> ScrubState:
        """End it after the part that is being verified."""
        if job == self._job and self._state == "running":
            self._state = "cancelled"
        return self.poll(job)

    def close(self) -> None:
        """End it at once."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        log.info("scrub begins", job=self._job, **{tier.name: tier.blocks for tier in self._tiers})
        try:
            await self._scrub_memory(self._tiers[0])
            for below, told in zip(self._below, self._tiers[1:], strict=True):
                await self._scrub_tier(below, told)
            if self._state == "running":
                self._state = "done"
        finally:
            if self._state == "running":
                self._state = "cancelled"
            checked, bad = (sum(getattr(tier, of) for tier in self._tiers) for of in ("checked", "bad"))
            tell = log.warning if bad else log.info
            tell("scrub ended", job=self._job, state=self._state, checked=checked, bad=bad)

    async def _scrub_memory(self, tier: _Tier) -> None:
        hashes = self._arena.published()
        tier.blocks = len(hashes)
        step = max(1, PART_BYTES // self._slot_bytes)
        for start in range(0, len(hashes), step):
            if self._state != "running":
                return
            began_s = clock.now_s()
            await self._verify(hashes[start : start + step], tier)
            await asyncio.sleep(RESTS * (clock.now_s() - began_s))

    async def _verify(self, hashes: tuple[BlockHash, ...], tier: _Tier) -> None:
        lease, found = self._arena.hold(hashes, SCRUB_HOLDER, HOLD_S, clock.now_s())
        self._settle()
        blocks: list[tuple[BlockHash, LeasedBlock]] = []
        for block_hash, held in zip(hashes, found, strict=True):
            if held is not None:
                blocks.append((block_hash, held[0]))
        try:
            views = [self._buffer[block.offset : block.offset + block.size_bytes] for _, block in blocks]
            sums = await checksums(self._offload, views)
            for (block_hash, block), actual in zip(blocks, sums, strict=True):
                if actual != block.checksum and self._arena.revoke(block_hash, block.generation):
                    tier.bad += 1
                    self._on_bad(block_hash)
        finally:
            self._arena.release(lease, SCRUB_HOLDER)
            self._settle()
        self.checked += len(blocks)
        tier.checked += len(hashes)  # those evicted meanwhile are no longer anybody's worry

    async def _scrub_tier(self, below: Tier, tier: _Tier) -> None:
        view = memoryview(mmap.mmap(-1, self._slot_bytes))
        stats = below.stats
        tier.blocks = len(below)
        bad_before = stats.corrupt + stats.failed
        at: int | None = None
        while self._state == "running":
            began_s = clock.now_s()
            at = await below.scrub(at, view)
            # Bad blocks that a reader came across meanwhile count too: they are as bad, and as gone.
            tier.bad = stats.corrupt + stats.failed - bad_before
            if at is None:
                return
            tier.checked += 1
            await asyncio.sleep(RESTS * (clock.now_s() - began_s))
