"""A small block put and got through each store that comes, by the way that real blocks go."""

import asyncio
from collections.abc import Collection, Sequence

from blake3 import blake3

from kvstore.client.nodes import StoreNodes, StoreNodeView
from kvstore.client.proof import Proof, StoreLife
from kvstore.client.reader import GetResult, Reader, Wanted
from kvstore.client.staging import Staging, StagingBuffer
from kvstore.client.writer import OutgoingBlock, Writer
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.wire.base import Ok
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import ClusterError, TransferError
from tracehaul.wire.hashing import HASH_BYTES
from tracehaul.wire.ids import BlockHash
from tracehaul.wire.operations import Discard

seldom = Seldom(Log(__name__))

PROBE_BYTES = 4096
TIMEOUT_S = 3.0
PROBES_MAX = 8
"""Stores tried at a time."""
TENANT = "probe"
"""On nobody's account."""
_NAMESPACE = b"tracehaul/probe|"
"""No layout's root begins with that, so no block is chained to it."""


class StoreProbe:
    """One worker's, under one hash whatever its lives: it leaves no more than one block, and takes that away, too.

    :meth:`run` must run beside it.
    """

    def __init__(self, name: str, nodes: StoreNodes, writer: Writer, reader: Reader, staging: Staging) -> None:
        self._nodes = nodes
        self._writer = writer
        self._reader = reader
        self._staging = staging
        self._root = BlockHash(blake3(_NAMESPACE).digest(HASH_BYTES))
        self._hash = BlockHash(blake3(_NAMESPACE + name.encode()).digest(HASH_BYTES))
        self._bytes = blake3(self._hash).digest(PROBE_BYTES)
        self._proof = Proof()
        self._changed = asyncio.Event()
        self._served = asyncio.Event()
        self._turns = asyncio.Semaphore(PROBES_MAX)

    @property
    def serving(self) -> bool:
        """See :class:`.proof.Proof`."""
        return self._proof.serving

    @property
    def fault(self) -> str:
        """See :class:`.proof.Proof`."""
        return self._proof.fault

    def set_nodes(self, nodes: Sequence[NodeInfo], draining: Collection[str] = ()) -> None:
        """The membership, after the client was told of it; other roles are ignored."""
        lives = [StoreLife(info.node, info.generation) for info in nodes if info.role == "store"]
        self._proof.set(lives, frozenset(draining), clock.now_s())
        self._judged()

    async def served(self) -> None:
        """Wait until this worker serves for the first time."""
        await self._served.wait()

    async def run(self) -> None:
        """Try each store that comes, and again until it passes, for ever."""
        while True:
            self._changed.clear()
            await asyncio.gather(*(self._try(life) for life in self._proof.due(clock.now_s())))
            next_s = self._proof.next_s()
            left_s = None if next_s is None else max(0.0, next_s - clock.now_s())
            try:
                async with asyncio.timeout(left_s):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _judged(self) -> None:
        self._changed.set()
        if self._proof.serving:
            self._served.set()

    async def _try(self, life: StoreLife) -> None:
        view = self._nodes.life(life.node, life.generation)
        if view is None:
            return
        try:
            async with self._turns:
                await self._prove(view, clock.now_s() + TIMEOUT_S)
        except ClusterError as error:
            seldom.warning("a store does not serve this worker", about=life.node, node=life.node, reason=str(error))
            self._proof.failed(life, str(error), clock.now_s())
        else:
            self._proof.passed(life)
        self._judged()

    async def _prove(self, view: StoreNodeView, deadline_s: float) -> None:
        """Raises ClusterError unless the bytes come back."""
        await self._nodes.warm(view, TIMEOUT_S)
        buffers = await self._staging.acquire(1, TIMEOUT_S)
        try:
            # What a life that was killed has left would be present, and nothing would be written.
            await self._nodes.call(view, Discard((self._hash,), TENANT), Ok, TIMEOUT_S)
            try:
                await self._put_and_get(view, buffers[0], deadline_s)
            finally:
                self._nodes.notify(view, Discard((self._hash,), TENANT))
        finally:
            self._staging.release(buffers)

    async def _put_and_get(self, view: StoreNodeView, buffer: StagingBuffer, deadline_s: float) -> None:
        nbytes = min(PROBE_BYTES, buffer.nbytes)
        buffer.view(nbytes)[:] = self._bytes[:nbytes]
        block = OutgoingBlock(self._hash, self._root, buffer, nbytes)
        (outcome,) = await self._writer.put_to(view, [block], deadline_s, TENANT)
        if outcome == "full":
            return  # it has no room now, and says so: it was reached by both ways
        if outcome not in ("published", "present"):
            raise TransferError(f"it did not take a block: {outcome}")
        buffer.view(nbytes)[:] = bytes(nbytes)
        results: list[GetResult] = ["absent"]
        await self._reader.get(view, [Wanted(0, self._hash, buffer)], results, deadline_s)
        if results[0] != nbytes:
            raise TransferError(f"it did not give back a block that it took: {results[0]}")
        if bytes(buffer.view(nbytes)) != self._bytes[:nbytes]:
            raise TransferError("it gave back other bytes than it took")
