"""The node's own look at bytes in its memory: those that were just written, and those that somebody found bad."""

import contextlib
from collections.abc import Sequence

from kvstore.client.moves import checksums
from kvstore.node.parts import Parts
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.runtime.offload import Offload
from tracehaul.wire.blocks import Publication, PublishOutcome
from tracehaul.wire.errors import Overloaded
from tracehaul.wire.ids import BlockHash, Checksum, SlotGeneration

log = Log(__name__)

SELF = ""
"""Holder of the node's own leases: no connection has this name."""


class Verifier:
    """Sums what lies in the arena's ``buffer``; drops there what is bad."""

    def __init__(self, parts: Parts, buffer: memoryview, offload: Offload) -> None:
        self._arena = parts.arena
        self._stats = parts.stats
        self._settle = parts.settler.settle
        self._buffer = buffer
        self._offload = offload
        self._seldom = Seldom(log)

    async def publish(self, blocks: Sequence[Publication], peer: str) -> list[PublishOutcome]:
        """Publish those whose bytes landed whole. The caller settles."""
        landings = [self._arena.landing(block, peer) for block in blocks]
        sums = await self._checksums([landing for landing in landings if landing is not None])
        landed = iter(sums)
        # Where nothing is reserved the arena answers; a reservation that ended meanwhile is fenced there.
        matches = [
            landing is None or next(landed) == block.checksum for landing, block in zip(landings, blocks, strict=True)
        ]
        now_s = clock.now_s()
        good = [block for block, matching in zip(blocks, matches, strict=True) if matching]
        published = iter(self._arena.publish(good, peer, now_s))
        outcomes: list[PublishOutcome] = []
        for block, matching in zip(blocks, matches, strict=True):
            if matching:
                outcomes.append(next(published))
            else:
                self._arena.withdraw(block.hash, block.generation, peer, now_s)
                self._seldom.warning("refused a block whose bytes arrived wrong", block=block.hash.hex(), peer=peer)
                outcomes.append("corrupt")
        return outcomes

    async def look(self, block_hash: BlockHash, generation: SlotGeneration) -> None:
        """Somebody's copy of a block was bad: drop ours only if it is bad too.

        Raises:
            Overloaded: too many blocks are being verified.
        """
        leased = self._arena.lease([block_hash], SELF, self._arena.config.lease_ttl_max_s, clock.now_s())
        self._settle()
        if leased is None:
            raise Overloaded("too many blocks are being verified")
        block = leased.blocks[0]
        try:
            if block is None or block.generation != generation:
                return
            (actual,) = await self._checksums([(block.offset, block.size_bytes)])
            if actual != block.checksum and self._arena.revoke(block_hash, generation):
                self.found_bad(block_hash)
        finally:
            self._arena.release(leased.lease, SELF)
            self._settle()

    async def try_to_look(self, block_hash: BlockHash, generation: SlotGeneration) -> None:
        """As :meth:`look`, if there is time for it: a block that is bad will be found bad again."""
        with contextlib.suppress(Overloaded):
            await self.look(block_hash, generation)

    def found_bad(self, block_hash: BlockHash) -> None:
        """A block in memory was dropped as its bytes had changed."""
        self._stats.corrupt_held += 1
        log.warning("dropped a bad block", tier="memory", block=block_hash.hex())

    async def _checksums(self, ranges: Sequence[tuple[int, int]]) -> list[Checksum]:
        return await checksums(self._offload, [self._buffer[offset : offset + size] for offset, size in ranges])
