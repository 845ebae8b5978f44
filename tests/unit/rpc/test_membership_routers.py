"""Routers that come and go while a node runs, under virtual time."""

import asyncio

from sim import loop as virtual
from tests.unit.rpc.test_membership import ME, OTHER, ROUTER, Router, World
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.wire.cluster import MembersChanged, NodeLoad


def test_a_router_that_is_set_later_is_joined_and_shown_the_epoch() -> None:
    async def main() -> None:
        world = World()
        await world.start()
        late = Router()
        await world.network.listen("late:1", late)
        world.membership.set_routers([ROUTER, "late:1"])
        await asyncio.sleep(1)
        assert [join.info.epoch for join in late.joins] == [5]
        assert len(world.router.joins) == 1, "nothing begins anew"
        late.lists.put_nowait(MembersChanged(2, joined=(OTHER,)))
        await asyncio.sleep(1)
        assert world.membership.members.nodes == (ME, OTHER)

    virtual.run(main)


def test_a_router_that_nobody_names_is_kept_while_it_answers_and_left_when_it_is_lost() -> None:
    async def main() -> None:
        world = World("second:1")
        await world.start()
        world.membership.set_routers([ROUTER])
        await asyncio.sleep(30)
        second = world.others["second:1"]
        assert len(second.beats) > 25
        assert len(second.joins) == 1
        world.network.crash("second:1")
        await asyncio.sleep(10)
        await world.network.listen("second:1", second)
        await asyncio.sleep(30)
        assert len(second.joins) == 1, "it is none any more"
        assert world.membership.joined.is_set()
        assert world.membership.members.nodes == (ME,)
        world.membership.set_routers([ROUTER, "second:1"])
        await asyncio.sleep(1)
        assert len(second.joins) == 2

    virtual.run(main)


def test_that_nobody_names_any_router_changes_nothing() -> None:
    async def main() -> None:
        world = World()
        await world.start()
        world.membership.set_routers([])
        world.network.crash(ROUTER)
        await asyncio.sleep(60)
        await world.network.listen(ROUTER, world.router)
        await asyncio.sleep(5)
        assert world.membership.joined.is_set()

    virtual.run(main)


def test_a_node_that_knows_no_router_waits_until_one_is_set() -> None:
    async def main() -> None:
        network, router = LocalNetwork(), Router()
        await network.listen(ROUTER, router)
        membership = Membership(Peers(network.at(ME.address)), [], ME, NodeLoad, lambda _: None)
        task = asyncio.create_task(membership.run())
        await asyncio.sleep(60)
        assert not task.done()
        membership.set_routers([ROUTER])
        await asyncio.sleep(1)
        assert membership.joined.is_set()
        task.cancel()

    virtual.run(main)
