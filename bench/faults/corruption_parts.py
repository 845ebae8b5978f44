"""Where bytes change in :mod:`bench.faults.corruption`: a transfer that flips bits on the way, a tier that lies."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from kvstore.tiers.base import Change, LoadOutcome, StoreOutcome, Tier, TierBlock, TierStats
from tracehaul.transfer.base import Copy, Memory, Region, Transfer
from tracehaul.wire.blocks import RegionDescriptor, Stored
from tracehaul.wire.ids import BlockHash, Checksum

Fault = Literal["put", "put-verified", "get", "get-unsummed"]


def flip(view: memoryview, dice: random.Random) -> int:
    """Change one bit; returns at which byte."""
    at = dice.randrange(view.nbytes)
    view[at] ^= 1 << dice.randrange(8)
    return at


def tampered(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """What a remote service may return for ``data``: its start, garbage, ``other``, or all but one bit of it."""
    match dice.randrange(4):
        case 0:
            return data[: dice.randrange(len(data))]
        case 1:
            return dice.randbytes(len(data))
        case 2:
            return other
        case _:
            changed = bytearray(data)
            flip(memoryview(changed), dice)
            return bytes(changed)


class FlippingTransfer:
    """A transfer under whose copies bits change on the way, a share of them while ``fault`` is set."""

    def __init__(self, inner: Transfer, arena: memoryview, dice: random.Random, share: float) -> None:
        self._inner = inner
        self._arena = arena
        self._dice = dice
        self._share = share
        self.fault: Fault | None = None
        self.flipped: set[int] = set()
        """Offsets in the arena of the copies that were hit."""

    @property
    def kind(self) -> str:
        return self._inner.kind

    def register(self, memory: Memory) -> Region:
        return self._inner.register(memory)

    def reaches(self, remote: RegionDescriptor) -> bool:
        return self._inner.reaches(remote)

    async def read(
        self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float
    ) -> Sequence[Checksum] | None:
        if self.fault == "get":
            # What arrives is summed by the transport: the source looks wrong while it looks, and is right after it.
            hit = {copy: bytes(self._arena[copy.remote_offset :][: copy.nbytes]) for copy in self._choose(copies)}
            for copy in hit:
                flip(self._arena[copy.remote_offset :][: copy.nbytes], self._dice)
            try:
                return await self._inner.read(remote, local, copies, timeout_s=timeout_s)
            finally:
                for copy, data in hit.items():
                    self._arena[copy.remote_offset :][: copy.nbytes] = data
        sums = await self._inner.read(remote, local, copies, timeout_s=timeout_s)
        if self.fault == "get-unsummed":
            for copy in self._choose(copies):
                flip(local.buffer[copy.local_offset :][: copy.nbytes], self._dice)
            return None
        return sums

    async def write(
        self, remote: RegionDescriptor, local: Region, copies: Sequence[Copy], *, timeout_s: float
    ) -> Sequence[Checksum] | None:
        sums = await self._inner.write(remote, local, copies, timeout_s=timeout_s)
        if self.fault not in ("put", "put-verified"):
            return sums
        for copy in self._choose(copies):
            flip(self._arena[copy.remote_offset :][: copy.nbytes], self._dice)
        return None if self.fault == "put" else sums  # a moment too late for one that sums what it stores

    async def broken(self) -> None:
        await self._inner.broken()

    async def close(self) -> None:
        await self._inner.close()

    def _choose(self, copies: Sequence[Copy]) -> list[Copy]:
        chosen = [copy for copy in copies if self._dice.random() < self._share]
        self.flipped.update(copy.remote_offset for copy in chosen)
        return chosen


class LyingTier:
    """A tier that breaks its promise: like a remote service without checksums, it returns whatever came.

    Cut off, garbage, another block's bytes, or one bit wrong, while ``lying`` is set and for a share of all loads.
    """

    def __init__(self, dice: random.Random, share: float) -> None:
        self.name = "remote"
        self.stores_max = 1
        self.metered = True
        self.stats = TierStats()
        self.lying = False
        self.lied: set[BlockHash] = set()
        self._dice = dice
        self._share = share
        self._objects: dict[BlockHash, tuple[TierBlock, bytes]] = {}
        self._listener: Callable[[Sequence[Change]], None] | None = None

    def __len__(self) -> int:
        return len(self._objects)

    @property
    def bytes_used(self) -> int:
        return sum(len(data) for _, data in self._objects.values())

    @property
    def bytes_max(self) -> int:
        return 1 << 40

    @property
    def available(self) -> bool:
        return True

    @property
    def parts(self) -> Sequence[Tier]:
        return (self,)

    async def run(self) -> None:
        pass

    def listen(self, listener: Callable[[Sequence[Change]], None]) -> None:
        self._listener = listener

    def reshare(self, shares: Mapping[str, float]) -> None:
        pass

    def protect(self, rank: Callable[[BlockHash], float | None], shares: Mapping[str, float]) -> None:
        pass

    def repinned(self, hashes: Iterable[BlockHash]) -> None:
        pass

    def find(self, block_hash: BlockHash) -> TierBlock | None:
        known = self._objects.get(block_hash)
        return None if known is None else known[0]

    def held(self) -> tuple[BlockHash, ...]:
        return tuple(self._objects)

    def touch(self, block_hash: BlockHash) -> None:
        pass

    async def store(self, blocks: Sequence[TierBlock], views: Sequence[memoryview]) -> list[StoreOutcome]:
        for block, view in zip(blocks, views, strict=True):
            self._objects[block.hash] = block, bytes(view[: block.size_bytes])
        if self._listener is not None:
            self._listener([Stored(block.hash) for block in blocks])
        return ["stored"] * len(blocks)

    async def load(self, hashes: Sequence[BlockHash], views: Sequence[memoryview]) -> list[LoadOutcome]:
        outcomes: list[LoadOutcome] = []
        for block_hash, view in zip(hashes, views, strict=True):
            known = self._objects.get(block_hash)
            outcomes.append("absent" if known is None else "loaded")
            if known is not None:
                data = self._lie(*known) if self.lying and self._dice.random() < self._share else known[1]
                view[: len(data)] = data
        return outcomes

    def _lie(self, block: TierBlock, data: bytes) -> bytes:
        self.lied.add(block.hash)
        other = next(body for key, (_, body) in self._objects.items() if key != block.hash)
        changed = tampered(data, (other * (len(data) // len(other) + 1))[: len(data)], self._dice)
        return changed.ljust(len(data), b"\0")

    async def drop(self, block_hash: BlockHash) -> None:
        self._objects.pop(block_hash, None)

    async def scrub(self, after: int | None, view: memoryview) -> int | None:
        return None

    async def flush(self) -> None:
        pass

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass
