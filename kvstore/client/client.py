"""Block bytes by hash, fleet wide: what workers know of the store.

Nothing here raises for the world: a lost, slow or lying node is a miss on read and an outcome on write, counted.
Bytes that are reported as got were read under a live lease and match their checksum.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from math import log

import msgspec

from kvstore.client.failover import Get, Holders, Look
from kvstore.client.looks import LOOK_TIMEOUT_S, Looks
from kvstore.client.nodes import StoreNodes
from kvstore.client.probe import StoreProbe
from kvstore.client.reader import GetResult, Reader, Wanted
from kvstore.client.staging import Staging, StagingBuffer
from kvstore.client.warming import Warming
from kvstore.client.writer import OutgoingBlock, PutOutcome, Writer
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.runtime.offload import Offload
from tracehaul.transfer.plane import Plane
from tracehaul.wire.blocks import Await, Awaited, AwaitState, Pin, Pinned
from tracehaul.wire.cluster import NodeInfo
from tracehaul.wire.errors import ClusterError
from tracehaul.wire.hashing import weight
from tracehaul.wire.ids import BlockHash, NodeId

__all__ = ["ClientStats", "OutgoingBlock", "PutOutcome", "StoreClient"]

BREAK_S = 1.0
"""How long a node that failed is left alone."""
RUN_SHARE = 0.75
"""Of the longest run that a node holds, what another must hold to be asked instead: fewer nodes to ask."""


class ClientStats(msgspec.Struct):
    """Counts since the client's start."""

    hits: int = 0
    hits_failed_over: int = 0
    """Blocks that another holder delivered than the one asked first."""
    misses: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """By :data:`kvstore.client.reader.MissReason`."""
    puts: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    """By :data:`PutOutcome`."""
    get_bytes: int = 0
    get_s: float = 0.0
    put_bytes: int = 0
    put_s: float = 0.0
    failovers: int = 0

    @property
    def corrupt(self) -> int:
        """Blocks whose landed bytes did not match: dropped, never returned."""
        return self.misses.get("corrupt", 0)


class StoreClient:
    """One process's access to the store.

    ``planes`` know the memory of ``staging``. Buffers come from ``staging`` and go back to it when a call has
    ended, however it ended: one that a late transfer may still touch returns to the pool when that has settled.
    """

    def __init__(self, peers: Peers, planes: Sequence[Plane], staging: Staging, offload: Offload) -> None:
        self.staging = staging
        self.stats = ClientStats()
        self._name = planes[0].region.descriptor.owner if planes else ""
        self._nodes = StoreNodes(peers, planes, BREAK_S)
        self._warming = Warming(self._nodes)
        self._looks = Looks(self._nodes)
        self._holders = Holders()
        self._reader = Reader(self._nodes, offload)
        self._writer = Writer(self._nodes, offload)

    def set_nodes(self, nodes: Sequence[NodeInfo], draining: Collection[NodeId] = ()) -> None:
        """The live members of the cluster, and which of them are about to leave: these are only read from.

        Those that are not store nodes are ignored. The way to one that is new is made in the background, so that no
        first get or put pays for it.
        """
        self._nodes.set(nodes, draining)
        self._warming.follow()

    def kinds(self) -> frozenset[str]:
        """See :meth:`StoreNodes.kinds`."""
        return self._nodes.kinds()

    async def warm(self, timeout_s: float) -> None:
        """Wait until the way to each store node is made.

        Raises:
            TimedOut: it is not within ``timeout_s``; says to which, and why.
        """
        await self._warming.done(timeout_s)

    def probe(self, name: str) -> StoreProbe:
        """What proves to the worker of that name that each store takes and gives blocks."""
        return StoreProbe(name, self._nodes, self._writer, self._reader, self.staging)

    async def exists(self, hashes: Sequence[BlockHash]) -> list[NodeId | None]:
        """Per hash a node that holds it, or None. A hint; takes at most half a second.

        Among several holders one with a long run from there on is named, and with little to do: see :func:`assign`.
        """
        if not hashes:
            return []
        held = await self._looks.look(hashes, (), LOOK_TIMEOUT_S)
        self._holders.saw(hashes, held)
        return assign(held, len(hashes), self._looks.reading, f"{self._name} {hashes[0].hex()}")

    async def holdings(self, hashes: Sequence[BlockHash]) -> dict[NodeId, bytes]:
        """What each live node says that it holds of these: a byte per block, none where it does not say."""
        return await self._looks.look(hashes, (), LOOK_TIMEOUT_S)

    async def get(
        self,
        hashes: Sequence[BlockHash],
        buffers: Sequence[StagingBuffer],
        timeout_s: float,
        where: Sequence[NodeId | None] | None = None,
    ) -> list[int | None]:
        """Land block ``i`` in ``buffers[i]``; per block its size in bytes, landed and verified, or None for a miss.

        ``where`` is what :meth:`exists` said, if it was asked. A block that its node does not deliver is asked for at
        others that may have it. A buffer whose block is missed holds anything.
        """
        assert len(hashes) == len(buffers)
        start_s = clock.now_s()
        look: Look | None = self._looks.look
        if where is None:
            look = None
            only = self._nodes.live()
            # The lease says what a node has: with one node there is nobody else to find it at.
            where = [only[0].node] * len(hashes) if len(only) == 1 else await self.exists(hashes)
        results: list[GetResult] = ["absent"] * len(hashes)
        groups: dict[NodeId, list[Wanted]] = {}
        for item, node in zip(map(Wanted, range(len(hashes)), hashes, buffers), where, strict=True):
            if node is not None:
                groups.setdefault(node, []).append(item)
        get = Get(self._nodes, self._reader, self.staging, self._holders, look, results, start_s + timeout_s)
        await get.run(groups)
        self.stats.hits_failed_over += get.failed_over
        self.stats.get_s += clock.now_s() - start_s
        return self._counted(results)

    async def put(
        self, home: NodeId | None, blocks: Sequence[OutgoingBlock], timeout_s: float, tenant: str = ""
    ) -> list[PutOutcome]:
        """Write and publish blocks on their trace's home, or on another live node if that one is gone.

        They count against ``tenant``'s quota. Fails over once. A block that another writer has begun is waited for,
        and written if that one dies. Only ``published`` and ``present`` say that a block can be got; ``in_flight``
        says that another writer lives and is slow.
        """
        if not blocks:
            return []
        start_s = clock.now_s()
        outcomes = await self._writer.put(home, blocks, start_s + timeout_s, tenant)
        self.stats.put_s += clock.now_s() - start_s
        self.stats.failovers = self._writer.failovers
        for outcome, count in Counter(outcomes).items():
            self.stats.puts[outcome] = self.stats.puts.get(outcome, 0) + count
        put = [block.nbytes for block, outcome in zip(blocks, outcomes, strict=True) if outcome == "published"]
        self.stats.put_bytes += sum(put)
        return outcomes

    async def wait(self, node: NodeId, hashes: Sequence[BlockHash], timeout_s: float) -> list[AwaitState]:
        """Wait until nobody writes these on ``node`` any more, at most ``timeout_s``; their states then.

        A node that cannot be asked has nothing.
        """
        view = self._nodes.find(node)
        if view is None or not hashes:
            return ["absent"] * len(hashes)
        request = Await(tuple(hashes), timeout_s)
        try:
            states = (await self._nodes.call(view, request, Awaited, timeout_s + LOOK_TIMEOUT_S)).states
        except ClusterError:
            return ["absent"] * len(hashes)
        return list(states) if len(states) == len(hashes) else ["absent"] * len(hashes)

    async def pin(self, node: NodeId, pin: Pin, timeout_s: float) -> Pinned | None:
        """Pin a trace's blocks on ``node``; None if it refuses or cannot be asked."""
        view = self._nodes.find(node)
        if view is None:
            return None
        try:
            return await self._nodes.call(view, pin, Pinned, timeout_s)
        except ClusterError:
            return None

    async def aclose(self) -> None:
        """Let releases and other notices under way end."""
        await self._warming.aclose()
        await self._looks.aclose()
        await self._nodes.aclose()

    def _counted(self, results: Sequence[GetResult]) -> list[int | None]:
        stats = self.stats
        sizes = [result if isinstance(result, int) else None for result in results]
        landed = [size for size in sizes if size is not None]
        stats.hits += len(landed)
        stats.get_bytes += sum(landed)
        if len(landed) < len(results):
            for result in results:
                if not isinstance(result, int):
                    stats.misses[result] = stats.misses.get(result, 0) + 1
        return sizes


def assign(
    held: Mapping[NodeId, bytes], count: int, reading: Mapping[NodeId, int] | None = None, reader: str = ""
) -> list[NodeId | None]:
    """Per block the node to ask, from what each holds (a byte per block; none where it did not answer).

    Of those that hold nearly the longest run from a block on, one is drawn for that run: the longer its own and the
    fewer reads are under way there (``reading``), the likelier. Drawn and not ranked, so that readers who know the same
    do not all go to the same; by ``reader``, so that one and the same reader is not sent to and fro.
    """
    answers = {node: flags for node, flags in sorted(held.items()) if flags}
    if len(answers) == 1:
        ((only, flags),) = answers.items()
        return [only if flag else None for flag in flags]
    reading = reading or {}
    where: list[NodeId | None] = []
    while len(where) < count:
        at = len(where)
        runs = {node: _run(flags, at) for node, flags in answers.items()}
        longest = max(runs.values(), default=0)
        if not longest:
            where.append(None)
            continue
        drawn = [
            (-log(_draw(node, reader)) * (1 + reading.get(node, 0)) / run, run, node)
            for node, run in runs.items()
            if run >= RUN_SHARE * longest
        ]
        _, run, node = min(drawn)
        where += [node] * run
    return where


def _draw(node: NodeId, reader: str) -> float:
    """Between 0 and 1, without them; the least ``-log(draw) / weight`` draws by weight."""
    return (int.from_bytes(weight(node, reader), "big") + 1) / (2**64 + 2)


def _run(flags: bytes, at: int) -> int:
    """Length of the run of ones from ``at`` on."""
    end = flags.find(0, at)
    return max(0, (len(flags) if end < 0 else end) - at)
