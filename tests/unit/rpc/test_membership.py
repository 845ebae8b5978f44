import asyncio
from collections.abc import AsyncGenerator

from sim import loop as virtual
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.wire.base import Ok
from tracehaul.wire.cluster import Heartbeat, Join, Members, NodeInfo, NodeLoad
from tracehaul.wire.errors import WrongNode
from tracehaul.wire.ids import Generation, NodeId
from tracehaul.wire.messages import Reply, Request

ROUTER = "router:1"
ME = NodeInfo(NodeId("decode-0"), Generation(7), "decode", "decode-0:1")
OTHER = NodeInfo(NodeId("store-0"), Generation(1), "store", "store-0:1")


class Router:
    """Tells joined nodes the lists that a test puts into ``lists``; None ends the streams."""

    def __init__(self) -> None:
        self.lists: asyncio.Queue[Members | None] = asyncio.Queue()
        self.joins: list[NodeInfo] = []
        self.beats: list[Heartbeat] = []
        self.knows = True

    async def call(self, request: Request, context: CallContext) -> Reply:
        assert isinstance(request, Heartbeat)
        self.beats.append(request)
        if not self.knows:
            raise WrongNode("join first")
        return Ok()

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        assert isinstance(request, Join)
        self.joins.append(request.info)
        yield Members(1, (ME,))
        while (members := await self.lists.get()) is not None:
            yield members

    def disconnected(self, peer: str) -> None:
        pass


class World:
    def __init__(self) -> None:
        self.network = LocalNetwork()
        self.router = Router()
        self.seen: list[Members] = []
        self.load = NodeLoad(running=1)
        peers = Peers(self.network.at(ME.address))
        self.membership = Membership(peers, [ROUTER], ME, lambda: self.load, self.seen.append)
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.network.listen(ROUTER, self.router)
        self.task = asyncio.create_task(self.membership.run())
        await asyncio.sleep(0.5)


def test_it_joins_beats_and_follows() -> None:
    async def main() -> None:
        world = World()
        assert world.membership.members == Members(0, ())
        await world.start()
        assert world.membership.joined.is_set()
        world.load = NodeLoad(running=2)
        await asyncio.sleep(9)
        assert len(world.router.beats) == 10
        assert [beat.load.running for beat in world.router.beats] == [1] + 9 * [2]
        assert world.router.beats[0].generation == 7
        world.router.lists.put_nowait(Members(2, (ME, OTHER)))
        world.router.lists.put_nowait(Members(3, (ME, OTHER)))  # the same nodes: no change
        await asyncio.sleep(1)
        assert world.seen == [Members(1, (ME,)), Members(2, (ME, OTHER))]
        assert world.membership.members.version == 3
        assert len(world.router.joins) == 1

    virtual.run(main)


def test_members_survive_the_router_and_its_return_is_noticed() -> None:
    async def main() -> None:
        world = World()
        await world.start()
        world.router.lists.put_nowait(Members(2, (ME, OTHER)))
        await asyncio.sleep(1)
        world.network.crash(ROUTER)
        await asyncio.sleep(60)
        assert not world.membership.joined.is_set()
        assert world.membership.members.nodes == (ME, OTHER)
        await world.network.listen(ROUTER, world.router)
        await asyncio.sleep(5)
        assert world.membership.joined.is_set()
        assert len(world.router.joins) == 2
        assert world.membership.members == Members(1, (ME,))

    virtual.run(main)


def test_a_frozen_router_is_joined_again_when_it_goes_on() -> None:
    async def main() -> None:
        world = World()
        await world.start()
        world.network.freeze(ROUTER)
        await asyncio.sleep(30)
        assert not world.membership.joined.is_set()
        world.network.thaw(ROUTER)
        await asyncio.sleep(5)
        assert world.membership.joined.is_set()

    virtual.run(main)


def test_a_router_that_ends_the_stream_or_forgot_us_is_joined_again() -> None:
    async def main() -> None:
        world = World()
        await world.start()
        world.router.lists.put_nowait(None)
        await asyncio.sleep(2)
        assert len(world.router.joins) == 2
        world.router.knows = False
        await asyncio.sleep(2)
        world.router.knows = True
        await asyncio.sleep(5)
        assert len(world.router.joins) >= 3
        assert world.membership.joined.is_set()

    virtual.run(main)


def test_cancelling_leaves_the_fleet() -> None:
    async def main() -> None:
        world = World()
        await world.start()
        assert world.task is not None
        world.task.cancel()
        await asyncio.wait([world.task])
        beats = len(world.router.beats)
        await asyncio.sleep(10)
        assert len(world.router.beats) == beats
        assert world.task.cancelled()

    virtual.run(main)
