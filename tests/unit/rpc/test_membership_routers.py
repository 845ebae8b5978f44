"""Routers that come and go while a node runs, under virtual time."""

import asyncio

import msgspec

from sim import loop as virtual
from tests.unit.rpc.test_membership import ME, OTHER, ROUTER, Router, World
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.wire.cluster import Heartbeat, MembersChanged, NodeLoad, Objection
from tracehaul.wire.messages import Reply, Request


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


def test_a_node_that_has_become_another_joins_again_before_it_leaves_as_what_it_was() -> None:
    async def main() -> None:
        world = World("second:1")
        await world.start()
        second = world.others["second:1"]
        world.load = NodeLoad(turning="prefill")
        turned = msgspec.structs.replace(world.membership.info, role="prefill", role_epoch=1)
        for router in (world.router, second):
            router.epoch = 5
        beats = len(world.router.beats)
        world.load = NodeLoad(running=7)
        world.membership.announce(turned)
        await asyncio.sleep(0.1)
        for router in (world.router, second):
            assert [(join.info.role, join.info.role_epoch) for join in router.joins] == [("decode", 0), ("prefill", 1)]
            assert router.joins[1].load.running == 7
        # What was told of its load came after that, as of what it is now; and the first stream's end is no loss.
        world.router.lists.put_nowait(None)
        await asyncio.sleep(2)
        assert {(beat.role_epoch, beat.load.running) for beat in world.router.beats[beats:]} == {(1, 7)}
        assert len(world.router.joins) == 2
        assert world.membership.joined.is_set()
        # Which list follows is the new one's.
        world.router.lists.put_nowait(MembersChanged(2, joined=(OTHER,)))
        await asyncio.sleep(1)
        assert OTHER in world.membership.members.nodes
        world.network.crash(ROUTER)
        await asyncio.sleep(1)
        await world.network.listen(ROUTER, world.router)
        await asyncio.sleep(5)
        assert [join.info.role_epoch for join in world.router.joins] == [0, 1, 1]

    virtual.run(main)


def test_it_asks_every_router_that_lists_it_and_none_that_is_lost() -> None:
    class Objects(Router):
        why = ""

        async def call(self, request: Request, context: CallContext) -> Reply:
            assert isinstance(request, Heartbeat)
            said = await super().call(request, context)
            return Objection(self.why) if self.why and request.load.turning else said

    async def main() -> None:
        world = World("second:1")
        second = world.others["second:1"] = Objects()
        await world.start()
        world.load = NodeLoad(turning="prefill")
        assert await world.membership.ask() == ""
        assert world.router.beats[-1].load.turning == second.beats[-1].load.turning == "prefill"
        second.why = "not now"
        assert await world.membership.ask() == "not now"
        world.load = NodeLoad()
        assert await world.membership.ask() == "", "it asks for nothing now"
        # One that stands still is waited for until it is lost.
        world.load = NodeLoad(turning="prefill")
        world.network.freeze("second:1")
        began_s = asyncio.get_running_loop().time()
        assert await world.membership.ask() == ""
        assert 1.0 < asyncio.get_running_loop().time() - began_s < 4.0
        world.network.crash(ROUTER)
        await asyncio.sleep(5)
        assert "no router" in await world.membership.ask()

    virtual.run(main)
