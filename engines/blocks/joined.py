"""An engine's process as the fleet knows it: an observer that is told of the stores, proves them, and uses them."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from engines.blocks.config import EngineConfig, EngineRefused
from engines.blocks.identity import RECORD_BYTES, RECORD_PARENT, difference, record_hash, record_of
from engines.blocks.routers import RoutersFile
from kvstore.client import OutgoingBlock, PutOutcome, Staging, StagingBuffer, StoreClient
from kvstore.client.probe import StoreProbe
from tracehaul.rpc.member import new_generation
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime.credentials import Credentials
from tracehaul.runtime.files import Refreshed, refreshing
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import ThreadOffload
from tracehaul.transfer.copying import compiled_here
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.opening import open_planes
from tracehaul.transfer.pieces import LendingRegion
from tracehaul.transfer.place import Place
from tracehaul.transfer.plane import Plane
from tracehaul.transfer.tcp_proof import Guard
from tracehaul.wire.cluster import Members, NodeInfo, NodeLoad
from tracehaul.wire.errors import ClusterError
from tracehaul.wire.hashing import KVLayout
from tracehaul.wire.ids import NodeId

log = Log(__name__)

COPY_THREADS = 2
RETRY_S = 1.0
TENANT = "engines"
"""Whose a pool's record is."""


class Joined:
    """Lives on one event loop; :meth:`run` is its life. ``told`` is called on that loop when there is news: None as
    soon as blocks can move, or why they never will."""

    client: StoreClient
    puts: list[StagingBuffer]
    """Half of the staging memory: whoever writes blocks from outside this loop has these from then on."""

    def __init__(
        self, config: EngineConfig, layout: KVLayout, page_bytes: int, name: str, told: Callable[[str | None], None]
    ) -> None:
        self._config = config
        self._layout = layout
        self._unit_bytes = max(page_bytes, RECORD_BYTES)
        self._name = name
        self._told = told
        self._changed = asyncio.Event()
        self.lending: LendingRegion | None = None
        """Where pages can be lent to transfers on this host; None: there is no such transport, or not yet."""

    async def run(self, stopping: asyncio.Event, opened: Callable[[], None]) -> None:
        """Open, join, and be told of the stores until ``stopping`` is set.

        Raises:
            EngineRefused: the pool holds something else.
            ClusterError: no router takes this process as it is, or no transport serves here.
            OSError: a file or an address cannot be used.
        """
        async with AsyncExitStack() as stack:
            membership, probe, background = await self._open(stack)
            opened()
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(work) for work in background]
                tasks += [group.create_task(membership.run()), group.create_task(probe.run())]
                tasks.append(group.create_task(self._identify(membership, probe)))
                await stopping.wait()
                for task in tasks:
                    task.cancel()

    def _token(self) -> str:
        file = self._config.token_file
        return Path(file).read_text().split("\n")[0].strip() if file else ""

    async def _open(self, stack: AsyncExitStack) -> tuple[Membership, StoreProbe, list[Coroutine[Any, Any, None]]]:
        config, generation = self._config, new_generation()
        credentials = Credentials(Path(config.secrets)) if config.secrets else None
        offload = ThreadOffload("copy", COPY_THREADS)
        stack.callback(offload.close)
        units = max(4, config.staging_bytes // self._unit_bytes)
        memory = allocate(units * self._unit_bytes, self._name)
        stack.callback(memory.close)
        guard = None
        if credentials is not None and config.data != "plain":
            guard = Guard(credentials, config.data == "tls")
        owner, place = f"{self._name}#{generation}", Place(listen=config.listen)
        planes = await open_planes(config.transports, owner, place, memory, offload, guard)
        stack.push_async_callback(planes.close)
        ways = list(planes.planes)
        for at, plane in enumerate(ways):
            if plane.transfer.kind == "shm" and compiled_here() is not None:
                self.lending = LendingRegion(plane.region)
                ways[at] = Plane(plane.transfer, self.lending)
        peers = Peers(TcpNetwork(credentials=credentials))
        stack.push_async_callback(peers.close)
        self.client = StoreClient(peers, ways, Staging(memory, self._unit_bytes), offload)
        stack.push_async_callback(self.client.aclose)
        self.puts = await self.client.staging.acquire(units // 2, 1.0)
        probe = self.client.probe(self._name)

        def on_members(members: Members) -> None:
            self.client.set_nodes(members.nodes, members.draining)
            probe.set_nodes(members.nodes, members.draining)
            self._changed.set()

        info = NodeInfo(NodeId(self._name), generation, "observer", "", pool=config.pool, transports=planes.how)
        membership = Membership(
            peers, config.routers, info, NodeLoad, on_members, cluster=config.cluster, token=self._token()
        )
        background: list[Coroutine[Any, Any, None]] = [plane.transfer.broken() for plane in planes.planes]
        followed: list[Refreshed] = [] if credentials is None else [credentials]
        if config.routers_file:
            followed.append(RoutersFile(Path(config.routers_file), membership.set_routers))
        if followed:
            background.append(refreshing(*followed))
        return membership, probe, background

    async def _identify(self, membership: Membership, probe: StoreProbe) -> None:
        """Compare the pool's record with ours, at the start and whenever stores come or go."""
        await membership.joined.wait()
        await probe.served()
        while True:
            self._changed.clear()
            if await self._is_ours():
                self._told(None)
                await self._changed.wait()
            await asyncio.sleep(RETRY_S)

    async def _is_ours(self) -> bool:
        """Whether the pool is known to hold what we do; it is written down if nobody has.

        Raises:
            EngineRefused: it holds something else.
        """
        pool, layout, timeout_s = self._config.pool, self._layout, self._config.timeout_s
        name, record = record_hash(pool), record_of(layout)
        buffers = await self.client.staging.acquire(1, timeout_s)
        try:
            (size,) = await self.client.get([name], buffers, timeout_s)
            if size is not None:
                why = difference(bytes(buffers[0].view(size)), layout, pool)
                if why is not None:
                    raise EngineRefused(f"tracehaul: {why}")
                return True
            if buffers[0].unsettled() is not None:
                return False
            buffers[0].view(RECORD_BYTES)[:] = record
            block = OutgoingBlock(name, RECORD_PARENT, buffers[0], RECORD_BYTES)
            (outcome,) = await self.client.put(None, [block], timeout_s, TENANT)
            return outcome in ("published", "full")  # present: another server was first, and is read
        except ClusterError as error:
            log.warning("the pool's record cannot be read", pool=pool, reason=error)
            return False
        finally:
            self.client.staging.release(buffers)

    async def put(self, blocks: Sequence[OutgoingBlock], timeout_s: float, tenant: str) -> list[PutOutcome]:
        """See :meth:`StoreClient.put`; after the deadline nothing is waited for."""
        try:
            async with asyncio.timeout(timeout_s + 1.0):
                return await self.client.put(None, blocks, timeout_s, tenant)
        except TimeoutError:
            return ["lost"] * len(blocks)
