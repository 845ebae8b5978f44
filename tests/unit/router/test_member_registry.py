"""The router's side of membership, under virtual time: who is a member, who is draining, who was silent too long."""

import asyncio
from collections.abc import Awaitable, Callable

from router.fleet.members import LOST_AFTER_S, SUSPECT_AFTER_S, MemberRegistry
from sim import loop as virtual
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.wire.cluster import Members, NodeInfo, NodeLoad
from tracehaul.wire.ids import Generation, NodeId

ROUTER = "router:1"


class World:
    def __init__(self) -> None:
        self.network = LocalNetwork()
        self.lists: list[tuple[NodeInfo, ...]] = []
        self.registry = MemberRegistry(self.lists.append)
        self.loads = {name: NodeLoad() for name in ("store-0", "store-1")}
        self.heard: dict[str, list[Members]] = {name: [] for name in self.loads}
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self.network.at(ROUTER).listen(ROUTER, self.registry)
        for name in self.loads:
            info = NodeInfo(NodeId(name), Generation(1), "store", f"{name}:1")
            peers = Peers(self.network.at(info.address))
            member = Membership(peers, [ROUTER], info, self._load(name), self.heard[name].append)
            self.tasks.append(asyncio.create_task(member.run()))
        await asyncio.sleep(2.0)

    def _load(self, name: str) -> Callable[[], NodeLoad]:
        return lambda: self.loads[name]

    def live(self) -> list[str]:
        return [str(info.node) for info in self.registry.live("store")]

    def members(self) -> list[str]:
        return [str(info.node) for info in self.registry.infos()]


def play(case: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World()
        await world.start()
        await case(world)
        for task in world.tasks:
            task.cancel()

    virtual.run(main)


def test_who_drains_gets_no_new_work_and_everybody_hears_of_it() -> None:
    async def case(world: World) -> None:
        assert world.live() == ["store-0", "store-1"]
        world.loads["store-1"] = NodeLoad(draining=True)
        await asyncio.sleep(1.5)
        assert world.live() == ["store-0"]
        assert world.members() == ["store-0", "store-1"]
        assert world.heard["store-0"][-1].draining == ("store-1",)
        assert [status.health for status in world.registry.statuses()] == ["ready", "draining"]
        lists = len(world.lists)
        await asyncio.sleep(5.0)
        assert len(world.lists) == lists
        world.loads["store-1"] = NodeLoad()
        await asyncio.sleep(1.5)
        assert world.live() == ["store-0", "store-1"]
        assert world.heard["store-0"][-1].draining == ()

    play(case)


def test_a_frozen_member_is_suspect_then_none_and_joins_again_when_it_goes_on() -> None:
    async def case(world: World) -> None:
        world.network.freeze("store-1:1")
        await asyncio.sleep(SUSPECT_AFTER_S + 1.5)
        assert world.live() == ["store-0"]
        assert world.members() == ["store-0", "store-1"]
        await asyncio.sleep(LOST_AFTER_S - SUSPECT_AFTER_S)
        assert world.members() == ["store-0"]
        assert [info.node for info in world.heard["store-0"][-1].nodes] == ["store-0"]
        world.network.thaw("store-1:1")
        await asyncio.sleep(5.0)
        assert world.live() == ["store-0", "store-1"]
        await asyncio.sleep(60.0)
        assert world.live() == ["store-0", "store-1"]

    play(case)
