"""Bytes changed where blocks can be: all found, none served, and nothing good refused.

A real store node with a real file, a real client, and one byte (or all of them) of a block changed:

======== ================================================================================================
memory   in the arena, after publish
slots    in the file, of a block that only the file has
records  in the file's table of contents, between two lives of the node
put      on the way from the client to the arena, by a transport that leaves checking to the node, and just after one
         that sums what it stores
get      on the way back, by a transport that sums what lands, and by one that does not
objects  in a bucket: cut off, garbage, another block's, one bit
tier     in a remote tier that does not check what it returns: cut off, garbage, another block's, one bit
======== ================================================================================================
"""

import asyncio
import contextlib
import logging
import os
import random
import tempfile
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from bench.common.report import Result, finish
from bench.faults.corruption_parts import FlippingTransfer, LyingTier, tampered
from kvstore.client.client import OutgoingBlock, StoreClient
from kvstore.client.staging import Staging
from kvstore.config import StoreConfig
from kvstore.node.assemble import Backing, assemble_store
from kvstore.node.node import StoreNode
from kvstore.tiers.base import Tier
from kvstore.tiers.disk import open_disk
from kvstore.tiers.fake_objects import MemoryObjects
from kvstore.tiers.object_tier import ObjectTier
from kvstore.tiers.objects import unpack_name
from kvstore.tiers.records import RECORD_BYTES, Layout, Record, unpack_records
from kvstore.tiers.tiering import TieringConfig
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer.memory import FileMemory, allocate
from tracehaul.transfer.plane import Plane
from tracehaul.transfer.shm import ShmTransfer
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.hashing import HASH_BYTES
from tracehaul.wire.ids import BlockHash, Generation, NodeId, SlotGeneration

COUNT = 10_000
QUICK_COUNT = 400
KINDS = ("memory", "slots", "records", "put", "get", "objects", "tier")
SHARES = (0.2, 0.2, 0.15, 0.15, 0.15, 0.1, 0.05)
SLOT = 8192
BATCH = 32
"""Blocks put, changed and got together."""
ARENA_SLOTS = 2 * BATCH
LAYOUT = Layout(SLOT, 4 * BATCH)
CHANGED_SHARE = 0.75
"""Of a batch; the others must be served."""
ROOT = BlockHash(b"\xff" * HASH_BYTES)
TIMEOUT_S = 30.0
CONFIG = StoreConfig(arena_bytes=ARENA_SLOTS * SLOT, slot_bytes=SLOT, late_write_s=0.01)

console = Console()


class Count(msgspec.Struct):
    """What came of the corruptions of one kind."""

    injected: int = 0
    found: int = 0
    served: int = 0
    """Blocks that a client was given with wrong bytes."""
    refused: int = 0
    """Good blocks that were not served."""


class Block(msgspec.Struct, frozen=True):
    """A block that was put."""

    hash: BlockHash
    data: bytes


class Site:
    """One life of a node, and a client of it."""

    def __init__(self, node: StoreNode, memory: FileMemory, client: StoreClient, way: FlippingTransfer) -> None:
        self.node = node
        self.memory = memory
        self.client = client
        self.way = way

    async def put(self, blocks: Sequence[Block]) -> list[str]:
        """Outcomes."""
        buffers = await self.client.staging.acquire(len(blocks), TIMEOUT_S)
        try:
            outgoing: list[OutgoingBlock] = []
            for block, buffer in zip(blocks, buffers, strict=True):
                buffer.view(len(block.data))[:] = block.data
                outgoing.append(OutgoingBlock(block.hash, ROOT, buffer, len(block.data)))
            return list(await self.client.put(NodeId("store"), outgoing, TIMEOUT_S))
        finally:
            self.client.staging.release(buffers)

    async def get(self, blocks: Sequence[Block]) -> list[bytes | None]:
        """What a client is given of each."""
        buffers = await self.client.staging.acquire(len(blocks), TIMEOUT_S)
        try:
            for buffer in buffers:
                buffer.view(buffer.nbytes)[:] = bytes(buffer.nbytes)
            sizes = await self.client.get([block.hash for block in blocks], buffers, TIMEOUT_S)
            await self.client.aclose()  # what it has to tell the node has arrived
            pairs = zip(buffers, sizes, strict=True)
            return [None if size is None else bytes(buffer.view(size)) for buffer, size in pairs]
        finally:
            self.client.staging.release(buffers)

    async def write_all(self) -> None:
        """Until everything that was put is in the tier."""
        assert self.node.tiering is not None
        while self.node.tiering.behind:  # noqa: ASYNC110 - the node tells nobody when it has caught up
            await asyncio.sleep(0.001)

    def forget_memory(self, blocks: Sequence[Block]) -> None:
        """Leave blocks in the tier only."""
        arena = self.node.arena
        for place in self.places(blocks).values():
            arena.revoke(*place)

    def places(self, blocks: Sequence[Block]) -> dict[int, tuple[BlockHash, SlotGeneration]]:
        """Offset in the arena, per block its hash and generation."""
        leased = self.node.arena.lease(
            [block.hash for block in blocks], "bench", 0.0, asyncio.get_running_loop().time()
        )
        assert leased is not None
        pairs = zip(blocks, leased.blocks, strict=True)
        return {found.offset: (block.hash, found.generation) for block, found in pairs if found is not None}


@contextlib.asynccontextmanager
async def open_site(tier: Tier, generation: int, dice: random.Random) -> AsyncGenerator[Site, None]:
    """A life of the node over ``tier``, which is closed at its end."""
    async with contextlib.AsyncExitStack() as stack:
        offload = ThreadOffload("corruption", 2)
        stack.callback(offload.close)
        memory = allocate(CONFIG.arena_bytes, "arena")
        stack.callback(memory.close)
        staging = allocate(BATCH * SLOT, "staging")
        stack.callback(staging.close)
        shm = ShmTransfer(f"store#{generation}", offload)
        stack.push_async_callback(shm.close)
        own = Plane(shm, shm.register(memory))
        backing = Backing(tier, TieringConfig(scrub_bytes_s=0))
        node = assemble_store(CONFIG, Generation(generation), [own], memory, offload, backing)
        way = FlippingTransfer(ShmTransfer(f"client#{generation}", offload), memory.buffer, dice, CHANGED_SHARE)
        stack.push_async_callback(way.close)
        server = await TcpNetwork().listen("127.0.0.1:0", node)
        running = asyncio.create_task(node.run())
        peers = Peers(TcpNetwork())
        client = StoreClient(peers, [Plane(way, way.register(staging))], Staging(staging, SLOT), offload)
        client.set_nodes([NodeInfo(NodeId("store"), Generation(generation), "store", server.address)])
        try:
            yield Site(node, memory, client, way)
        finally:
            await client.aclose()
            await peers.close()
            await server.close()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await node.aclose()


class Injector:
    """Injects corruptions of each kind, batch by batch, into blocks that nobody put before."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._path = folder / "corruption.blocks"
        self._dice = random.Random(seed)
        self._number = 0
        self._generation = 0
        self.counts = {kind: Count() for kind in KINDS}

    async def run(self, wanted: dict[str, int]) -> None:
        """At least ``wanted`` of each kind."""
        async with self._open(await self._disk()) as site:
            for kind, inject in (("memory", self._memory), ("slots", self._slots), ("put", self._put)):
                while self.counts[kind].injected < wanted[kind]:
                    await inject(site, self.counts[kind])
            while self.counts["get"].injected < wanted["get"]:
                await self._get(site, self.counts["get"], unsummed=self._dice.random() < 0.5)
        while self.counts["records"].injected < wanted["records"]:
            await self._records(self.counts["records"])
        objects = MemoryObjects()
        offload = ThreadOffload("objects")
        async with self._open(ObjectTier("s3", objects, offload, LAYOUT.slots_max, SLOT)) as site:
            while self.counts["objects"].injected < wanted["objects"]:
                await self._objects(site, objects, self.counts["objects"])
        lying = LyingTier(self._dice, CHANGED_SHARE)
        async with self._open(lying) as site:
            while self.counts["tier"].injected < wanted["tier"]:
                await self._tier(site, lying, self.counts["tier"])

    async def _disk(self) -> Tier:
        return await open_disk(self._path, LAYOUT.file_bytes, SLOT)

    def _open(self, tier: Tier) -> contextlib.AbstractAsyncContextManager[Site]:
        self._generation += 1
        return open_site(tier, self._generation, self._dice)

    def _blocks(self) -> list[Block]:
        blocks: list[Block] = []
        for _ in range(BATCH):
            self._number += 1
            data = self._dice.randbytes(self._dice.randrange(SLOT // 2, SLOT))
            blocks.append(Block(BlockHash(self._number.to_bytes(HASH_BYTES)), data))
        return blocks

    def _sample(self, blocks: Sequence[Block]) -> list[Block]:
        return [block for block in blocks if self._dice.random() < CHANGED_SHARE]

    async def _published(self, site: Site) -> list[Block]:
        blocks = self._blocks()
        outcomes = await site.put(blocks)
        assert set(outcomes) == {"published"}, outcomes
        await site.write_all()
        return blocks

    async def _judge(self, site: Site, blocks: Sequence[Block], bad: Sequence[Block], count: Count) -> None:
        """Get all of them: the bad ones must be missed, the others be right."""
        hit = {block.hash for block in bad}
        for block, data in zip(blocks, await site.get(blocks), strict=True):
            if data is not None and data != block.data:
                count.served += 1
            elif block.hash in hit:
                count.found += data is None
            elif data is None:
                count.refused += 1
        count.injected += len(bad)

    # --- kinds --------------------------------------------------------------------------------------------

    async def _memory(self, site: Site, count: Count) -> None:
        blocks = await self._published(site)
        offsets = {block_hash: offset for offset, (block_hash, _) in site.places(blocks).items()}
        bad = self._sample(blocks)
        for block in bad:
            _flip(site.memory.buffer, offsets[block.hash], len(block.data), self._dice)
        held = site.node.stats.corrupt_held
        await self._judge(site, blocks, bad, count)
        assert site.node.stats.corrupt_held - held == len(bad), "the node kept what readers found"
        # The file still has them whole: they come back.
        again = Count()
        await self._judge(site, blocks, [], again)
        count.served += again.served
        count.refused += again.refused

    async def _slots(self, site: Site, count: Count) -> None:
        blocks = await self._published(site)
        site.forget_memory(blocks)
        slots = self._find_records()
        bad = self._sample(blocks)
        with self._path.open("r+b") as file:
            for block in bad:
                at = LAYOUT.data_offset + slots[block.hash] * SLOT + self._dice.randrange(len(block.data))
                _flip_file(file.fileno(), at, self._dice)
        await self._judge(site, blocks, bad, count)
        await self._judge(site, bad, [], gone := Count())
        assert gone.refused == len(bad), "a bad block was not dropped"
        count.served += gone.served

    async def _records(self, count: Count) -> None:
        async with self._open(await self._disk()) as site:
            blocks = await self._published(site)
        slots = self._find_records()
        bad = self._sample(blocks)
        before = await self._disk()
        before.close()  # it still has bad records of earlier batches: they are erased when their slots are used
        with self._path.open("r+b") as file:
            for block in bad:
                at = LAYOUT.records_offset + slots[block.hash] * RECORD_BYTES + self._dice.randrange(RECORD_BYTES)
                _flip_file(file.fileno(), at, self._dice)
        tier = await self._disk()
        assert tier.stats.unreadable - before.stats.unreadable == len(bad), "records that changed were taken for true"
        async with self._open(tier) as site:
            await self._judge(site, blocks, bad, count)

    async def _put(self, site: Site, count: Count) -> None:
        blocks = self._blocks()
        verified = self._dice.random() < 0.5
        site.way.flipped.clear()
        site.way.fault = "put-verified" if verified else "put"
        outcomes = await site.put(blocks)
        site.way.fault = None
        if verified:  # published, as nobody can know yet
            assert set(outcomes) == {"published"}, outcomes
            places = site.places(blocks)
            hit = {places[offset][0] for offset in site.way.flipped}
            bad = [block for block in blocks if block.hash in hit]
        else:
            assert outcomes.count("corrupt") == len(site.way.flipped), outcomes
            bad = [block for block, outcome in zip(blocks, outcomes, strict=True) if outcome == "corrupt"]
        await self._judge(site, blocks, bad, count)
        await site.write_all()
        await asyncio.sleep(2 * CONFIG.late_write_s)  # their slots rest

    async def _get(self, site: Site, count: Count, *, unsummed: bool) -> None:
        blocks = await self._published(site)
        places = site.places(blocks)
        hashes = {block.hash: block for block in blocks}
        site.way.flipped.clear()
        site.way.fault = "get-unsummed" if unsummed else "get"
        got = await site.get(blocks)
        site.way.fault = None
        bad = [hashes[places[offset][0]] for offset in site.way.flipped]
        count.injected += len(bad)
        for block, data in zip(blocks, got, strict=True):
            count.served += data is not None and data != block.data
            count.found += block in bad and data is None
            count.refused += block not in bad and data is None
        await self._judge(site, blocks, [], count)  # the node has checked its own: they are right, and still there

    async def _objects(self, site: Site, objects: MemoryObjects, count: Count) -> None:
        blocks = await self._published(site)
        site.forget_memory(blocks)
        bad = self._sample(blocks)
        hit = {block.hash: block for block in bad}
        names = {unpacked[0].hash: name for name in objects.data if (unpacked := unpack_name(name)) is not None}
        for block_hash, block in hit.items():
            other = next(other.data for other in blocks if other.hash != block_hash)
            objects.data[names[block_hash]] = bytearray(tampered(block.data, other, self._dice))
        await self._judge(site, blocks, bad, count)
        await self._judge(site, bad, [], gone := Count())
        assert gone.refused == len(bad), "a bad object was not dropped"
        count.served += gone.served

    async def _tier(self, site: Site, tier: LyingTier, count: Count) -> None:
        blocks = await self._published(site)
        site.forget_memory(blocks)
        tier.lied.clear()
        tier.lying = True
        got = await site.get(blocks)
        tier.lying = False
        count.injected += len(tier.lied)
        for block, data in zip(blocks, got, strict=True):
            count.served += data is not None and data != block.data
            count.found += block.hash in tier.lied and data is None
            count.refused += block.hash not in tier.lied and data is None
        await self._judge(site, blocks, [], count)

    def _find_records(self) -> dict[BlockHash, int]:
        """The slot of each block, by the newest record that names it."""
        raw = self._path.read_bytes()[LAYOUT.records_offset :]
        found: dict[BlockHash, Record] = {}
        for record in unpack_records(raw, LAYOUT):
            if isinstance(record, int):
                continue
            known = found.get(record.block.hash)
            if known is None or known.sequence < record.sequence:
                found[record.block.hash] = record
        return {block_hash: record.slot for block_hash, record in found.items()}


def _flip(buffer: memoryview, offset: int, size: int, dice: random.Random) -> None:
    buffer[offset + dice.randrange(size)] ^= 1 << dice.randrange(8)


def _flip_file(fd: int, at: int, dice: random.Random) -> None:
    (byte,) = os.pread(fd, 1, at)
    os.pwrite(fd, bytes([byte ^ (1 << dice.randrange(8))]), at)


def results_of(counts: dict[str, Count]) -> list[Result]:
    """Totals, then by kind."""
    results: list[Result] = []
    for name in ("injected", "found", "served", "refused"):
        by_kind = {kind: getattr(count, name) for kind, count in counts.items()}
        results.append(Result(f"store.corruption.{name}", sum(by_kind.values()), "blocks"))
        results += [Result(f"store.corruption.{name}.{kind}", value, "blocks") for kind, value in by_kind.items()]
    return results


def main(
    count: Annotated[int, typer.Option(help="Corruptions in all, at least.")] = COUNT,
    seed: Annotated[int, typer.Option(help="Of where they strike.")] = 1,
    folder: Annotated[Path | None, typer.Option(help="Where the file is; a temporary folder if not given.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results there.")] = None,
    quick: Annotated[bool, typer.Option(help="A few hundred only.")] = False,
) -> None:
    """Change bytes and see who notices."""
    count = min(count, QUICK_COUNT) if quick else count
    wanted = {kind: round(count * share) for kind, share in zip(KINDS, SHARES, strict=True)}
    logging.getLogger("kvstore.tiers").setLevel(logging.ERROR)  # a line for each of thousands says nothing more
    with tempfile.TemporaryDirectory(dir=folder, prefix="tracehaul-corruption-") as place:
        injector = Injector(Path(place), seed)
        asyncio.run(injector.run(wanted))
    finish(
        {"count": count, "seed": seed, "slot_bytes": SLOT, "quick": quick}, results_of(injector.counts), json, console
    )
    if any(c.found != c.injected or c.served or c.refused for c in injector.counts.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
