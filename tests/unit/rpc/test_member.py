"""A node's life in the fleet, whatever its role, under virtual time."""

import asyncio
from collections.abc import AsyncGenerator

import msgspec
import pytest

from router.fleet.members import MemberRegistry
from sim import loop as virtual
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.member import Member, Phase, Serving, serving
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.errors import WrongPool
from tracehaul.wire.ids import BlockHash, Generation, NodeId
from tracehaul.wire.messages import Reply, Request

ROUTER = "router:1"
INFO = NodeInfo(NodeId("decode-0"), Generation(7), "decode", "decode-0:0")


class Idle:
    """Serves nothing."""

    async def call(self, request: Request, context: CallContext) -> Reply:
        return Ok()

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        yield Ok()

    def disconnected(self, peer: str) -> None:
        pass


class World:
    """A router's registry, one node, and what the node is told and tells."""

    def __init__(self) -> None:
        self.network = LocalNetwork()
        self.router = MemberRegistry(lambda _: None)
        self.load = NodeLoad()
        self.stopping = asyncio.Event()
        self.told: list[tuple[float, Phase]] = []
        self.ran: list[str] = []
        self.fails = False

    async def work(self) -> None:
        self.ran.append("began")
        try:
            await asyncio.sleep(1.0)
            if self.fails:
                raise ValueError("a bug")
            await asyncio.sleep(1000.0)
        finally:
            self.ran.append("ended")

    async def run(self, within: Serving) -> None:
        await within.run(
            self.stopping, drain_timeout_s=5.0, told=lambda phase: self.told.append((clock.now_s(), phase))
        )

    @property
    def members(self) -> list[str]:
        return [info.address for info in self.router.infos()]

    def member(self) -> Member:
        return Member(INFO, Idle(), lambda: self.load, lambda _: None, (self.work,))


async def start(world: World) -> asyncio.Task[None]:
    async def life() -> None:
        peers = Peers(world.network)
        async with serving(world.member(), world.network, peers, [ROUTER]) as node:
            assert node.info.address != INFO.address, "the port that it got"
            await world.run(node)

    await world.network.listen(ROUTER, world.router)
    task = asyncio.create_task(life())
    await asyncio.sleep(0.5)
    return task


def test_it_is_ready_when_it_is_a_member_and_leaves_before_its_last_step_ends() -> None:
    async def main() -> None:
        world = World()
        task = await start(world)
        assert [phase for _, phase in world.told] == ["ready"]
        (address,) = world.members
        assert await Peers(world.network).call(address, Ping(), timeout_s=1.0) == Ok()
        world.load = NodeLoad(running=1)
        world.stopping.set()
        await asyncio.sleep(1.0)
        assert [phase for _, phase in world.told] == ["ready", "stopping"]
        assert world.members == [], "no work comes any more"
        assert not task.done()
        assert world.ran == ["began"], "what runs needs it"
        world.load = NodeLoad()
        await asyncio.sleep(0.1)
        assert task.done()
        assert world.ran == ["began", "ended"]

    virtual.run(main)


def test_it_is_ready_when_it_can_do_what_it_is_there_for() -> None:
    async def main() -> None:
        world = World()
        served = asyncio.Event()

        async def waited() -> None:
            await served.wait()

        made = world.member
        world.member = lambda: made()._replace(served=waited)  # type: ignore[method-assign]
        task = await start(world)
        await asyncio.sleep(5.0)
        assert len(world.members) == 1
        assert world.told == [], "joined is not ready"
        served.set()
        await asyncio.sleep(0.01)
        assert [phase for _, phase in world.told] == ["ready"]
        world.stopping.set()
        await task

    virtual.run(main)


def test_a_node_that_cannot_serve_can_be_stopped() -> None:
    async def main() -> None:
        world = World()

        async def never() -> None:
            await asyncio.sleep(1000.0)

        made = world.member
        world.member = lambda: made()._replace(served=never)  # type: ignore[method-assign]
        task = await start(world)
        world.stopping.set()
        await task
        assert [phase for _, phase in world.told] == ["stopping"]

    virtual.run(main)


def test_it_tells_the_host_that_others_reach_it_by() -> None:
    async def main() -> None:
        world = World()
        made = world.member
        world.member = lambda: made()._replace(announce="gpu-7")  # type: ignore[method-assign]
        task = await start(world)
        assert [address.partition(":")[0] for address in world.members] == ["gpu-7"]
        world.stopping.set()
        await task

    virtual.run(main)


def test_steps_that_do_not_end_are_cut_off() -> None:
    async def main() -> None:
        world = World()
        task = await start(world)
        world.load = NodeLoad(waiting=1)
        world.stopping.set()
        stopped_s = clock.now_s()
        await task
        assert clock.now_s() - stopped_s == pytest.approx(5.0)

    virtual.run(main)


def test_it_ends_with_what_fails_behind_it() -> None:
    async def main() -> None:
        world = World()
        world.fails = True
        task = await start(world)
        with pytest.raises(ExceptionGroup) as failed:
            await task
        assert [str(error) for error in failed.value.exceptions] == ["a bug"]
        assert world.members == []

    virtual.run(main)


def test_a_node_can_be_stopped_before_there_is_a_router() -> None:
    async def main() -> None:
        world = World()

        async def life() -> None:
            async with serving(world.member(), world.network, Peers(world.network), [ROUTER]) as node:
                await world.run(node)

        task = asyncio.create_task(life())
        await asyncio.sleep(3.0)
        assert world.told == []
        world.stopping.set()
        await task
        assert [phase for _, phase in world.told] == ["stopping"]

    virtual.run(main)


def test_a_node_that_fits_no_pool_ends_with_that_alone() -> None:
    async def main() -> None:
        world = World()
        await world.network.listen(ROUTER, world.router)
        for name, root in (("decode-1", b"a"), ("decode-0", b"b")):
            info = msgspec.structs.replace(INFO, node=NodeId(name), address=f"{name}:0", root=BlockHash(16 * root))

            async def life(info: NodeInfo = info) -> None:
                member = world.member()._replace(info=info)
                async with serving(member, world.network, Peers(world.network), [ROUTER]) as node:
                    await world.run(node)

            task = asyncio.create_task(life())
            await asyncio.sleep(0.5)
        assert len(world.members) == 1
        with pytest.raises(WrongPool, match="another KV layout"):
            await task

    virtual.run(main)
