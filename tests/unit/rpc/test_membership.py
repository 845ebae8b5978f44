import asyncio
from collections.abc import AsyncGenerator

import msgspec
import pytest

from sim import loop as virtual
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.membership import GRACE_S, TAKEN_S, Membership
from tracehaul.rpc.peers import Peers
from tracehaul.wire.base import Ok
from tracehaul.wire.cluster import Heartbeat, Join, Members, MembersChanged, NodeInfo, NodeLoad
from tracehaul.wire.errors import ClusterError, Fenced, NameTaken, WrongCluster, WrongNode, WrongVersion
from tracehaul.wire.ids import Epoch, Generation, NodeId, StepId, TraceId
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.spent import Charge, Reading
from tracehaul.wire.version import WIRE

ROUTER = "router:1"
ME = NodeInfo(NodeId("decode-0"), Generation(7), "decode", "decode-0:1")
OTHER = NodeInfo(NodeId("store-0"), Generation(1), "store", "store-0:1")


class Router:
    """Tells joined nodes the lists that a test puts into ``lists``; None ends the streams."""

    def __init__(self) -> None:
        self.lists: asyncio.Queue[Members | MembersChanged | None] = asyncio.Queue()
        self.joins: list[Join] = []
        self.beats: list[Heartbeat] = []
        self.knows = True
        self.epoch = 5
        self.refuses: ClusterError | None = None

    async def call(self, request: Request, context: CallContext) -> Reply:
        assert isinstance(request, Heartbeat)
        self.beats.append(request)
        if not self.knows:
            raise WrongNode("join first")
        return Ok()

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        assert isinstance(request, Join)
        self.joins.append(request)
        if self.refuses is not None:
            raise self.refuses
        yield Members(1, (ME,), epoch=Epoch(self.epoch))
        while (members := await self.lists.get()) is not None:
            yield members

    def disconnected(self, peer: str) -> None:
        pass


class World:
    def __init__(self, *others: str) -> None:
        self.network = LocalNetwork()
        self.router = Router()
        self.others = {address: Router() for address in others}
        self.seen: list[Members] = []
        self.load = NodeLoad(running=1)
        peers = Peers(self.network.at(ME.address))
        self.membership = Membership(peers, [ROUTER, *others], ME, lambda: self.load, self.seen.append, cluster="ours")
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.network.listen(ROUTER, self.router)
        for address, router in self.others.items():
            await self.network.listen(address, router)
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
        world.router.lists.put_nowait(Members(2, (ME, OTHER), epoch=Epoch(5)))
        world.router.lists.put_nowait(Members(3, (ME, OTHER), epoch=Epoch(5)))  # the same nodes: no change
        await asyncio.sleep(1)
        assert world.seen == [Members(1, (ME,)), Members(2, (ME, OTHER))]
        assert len(world.router.joins) == 1

    virtual.run(main)


def test_what_there_was_to_tell_is_told_to_each_router_that_is_joined() -> None:
    async def main() -> None:
        network, router = LocalNetwork(), Router()
        charges = tuple(Charge("", TraceId("t"), StepId(step), Reading(1)) for step in ("long ago", "now"))
        load = NodeLoad(running=1, charges=charges[1:])
        peers = Peers(network.at(ME.address))
        node = Membership(peers, [ROUTER], ME, lambda: load, lambda _: None, cluster="ours", history=lambda: charges)
        await network.listen(ROUTER, router)
        task = asyncio.create_task(node.run())
        await asyncio.sleep(2)
        network.crash(ROUTER)
        await network.listen(ROUTER, router)
        await asyncio.sleep(5)
        assert [join.load.charges for join in router.joins] == [charges, charges]
        assert [join.load.running for join in router.joins] == [1, 1]
        assert {beat.load.charges for beat in router.beats} == {charges[1:]}
        task.cancel()

    virtual.run(main)


def test_members_survive_the_router_and_its_return_is_noticed() -> None:
    async def main() -> None:
        world = World()
        await world.start()
        world.router.lists.put_nowait(Members(2, (ME, OTHER), epoch=Epoch(5)))
        await asyncio.sleep(1)
        world.network.crash(ROUTER)
        await asyncio.sleep(60)
        assert not world.membership.joined.is_set()
        assert world.membership.members.nodes == (ME, OTHER)
        await world.network.listen(ROUTER, world.router)
        await asyncio.sleep(5)
        assert world.membership.joined.is_set()
        assert len(world.router.joins) == 2
        assert world.membership.members.nodes == (ME,)

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


def test_it_says_what_it_is_when_it_joins() -> None:
    async def main() -> None:
        world = World()
        await world.start()
        (join,) = world.router.joins
        assert (join.cluster, join.wire, join.load, join.info.epoch) == ("ours", WIRE, world.load, 0)
        assert world.membership.info == msgspec.structs.replace(ME, epoch=Epoch(5))

    virtual.run(main)


def test_what_must_be_known_at_once_is_said_before_the_next_heartbeat() -> None:
    async def main() -> None:
        world = World()
        await world.start()
        beats = len(world.router.beats)
        world.load = NodeLoad(serving=False)
        await asyncio.sleep(0.2)
        assert len(world.router.beats) == beats
        world.network.freeze(ROUTER)
        saying = asyncio.create_task(world.membership.say())
        await asyncio.sleep(0.2)
        assert not saying.done(), "nobody has answered"
        world.network.thaw(ROUTER)
        await asyncio.wait_for(saying, 0.1)
        assert not world.router.beats[-1].load.serving

    virtual.run(main)


def test_changes_are_applied_and_a_gap_brings_the_whole_list() -> None:
    async def main() -> None:
        world = World()
        await world.start()
        world.router.lists.put_nowait(MembersChanged(2, joined=(OTHER,), draining=(OTHER.node,)))
        await asyncio.sleep(1)
        assert world.membership.members.nodes == (ME, OTHER)
        assert world.membership.members.draining == (OTHER.node,)
        world.router.lists.put_nowait(MembersChanged(3, left=(OTHER.node,)))
        await asyncio.sleep(1)
        assert world.membership.members.nodes == (ME,)
        assert len(world.router.joins) == 1
        world.router.lists.put_nowait(MembersChanged(5, joined=(OTHER,)))
        await asyncio.sleep(2)
        assert len(world.router.joins) == 2
        assert world.router.joins[1].info.epoch == 5, "it shows the epoch that it has"

    virtual.run(main)


def test_one_router_issues_the_epoch_and_the_others_are_shown_it() -> None:
    async def main() -> None:
        world = World("second:1", "third:1")
        await world.start()
        routers = [world.router, *world.others.values()]
        assert sorted(join.info.epoch for router in routers for join in router.joins) == [0, 5, 5]
        await asyncio.sleep(9)
        assert [len(router.beats) for router in routers] == [10, 10, 10]

    virtual.run(main)


def test_one_router_of_two_dies_and_nothing_changes() -> None:
    async def main() -> None:
        world = World("second:1")
        await world.start()
        second = world.others["second:1"]
        for router in (world.router, second):
            router.lists.put_nowait(MembersChanged(2, joined=(OTHER,)))
        await asyncio.sleep(1)
        seen = len(world.seen)
        world.network.crash(ROUTER)
        await asyncio.sleep(60)
        assert world.membership.joined.is_set()
        assert world.membership.members.nodes == (ME, OTHER)
        assert len(world.seen) == seen
        second.lists.put_nowait(MembersChanged(3, left=(OTHER.node,)))
        await asyncio.sleep(1)
        assert world.membership.members.nodes == (ME,), "the one that is left is believed"

    virtual.run(main)


def test_what_only_the_lost_router_knew_is_forgotten_after_a_grace() -> None:
    async def main() -> None:
        world = World("second:1")
        await world.start()
        world.router.lists.put_nowait(MembersChanged(2, joined=(OTHER,)))
        await asyncio.sleep(1)
        world.network.crash(ROUTER)
        await asyncio.sleep(GRACE_S - 1)
        assert world.membership.members.nodes == (ME, OTHER)
        await asyncio.sleep(2)
        assert world.membership.members.nodes == (ME,)

    virtual.run(main)


def test_a_frozen_router_holds_up_no_other() -> None:
    async def main() -> None:
        world = World("second:1")
        await world.network.listen("first:1", world.router)
        world.network.freeze(ROUTER)
        await world.start()
        await asyncio.sleep(10)
        assert world.membership.joined.is_set()
        assert world.router.joins == []
        assert len(world.others["second:1"].beats) >= 3

    virtual.run(main)


def test_a_higher_epoch_of_one_router_is_shown_to_the_others() -> None:
    async def main() -> None:
        world = World("second:1")
        world.others["second:1"].epoch = 9
        await world.start()
        await asyncio.sleep(3)
        assert world.membership.info.epoch == 9
        assert [join.info.epoch for join in world.router.joins][:2] == [0, 9]

    virtual.run(main)


@pytest.mark.parametrize("refusal", [Fenced("another has it"), WrongCluster("not ours"), WrongVersion("too old")])
def test_a_node_that_is_refused_ends_with_that(refusal: ClusterError) -> None:
    async def main() -> None:
        world = World()
        world.router.refuses = refusal
        await world.start()
        assert world.task is not None
        with pytest.raises(type(refusal), match=str(refusal)):
            await world.task
        assert len(world.router.joins) == 1

    virtual.run(main)


def test_a_name_that_is_taken_is_asked_for_again_until_it_is_free_or_for_a_while() -> None:
    async def main() -> None:
        world = World("second:1")
        world.router.refuses = NameTaken("another decode-0 is alive")
        await world.start()
        await asyncio.sleep(TAKEN_S / 2)
        assert not world.membership.joined.is_set()
        assert world.others["second:1"].joins == [], "another router may not know of the other yet"
        world.router.refuses = None
        await asyncio.sleep(2)
        assert world.membership.joined.is_set()

        world = World()
        world.router.refuses = NameTaken("another decode-0 is alive")
        await world.start()
        assert world.task is not None
        with pytest.raises(NameTaken, match="another decode-0 is alive"):
            await world.task

    virtual.run(main)


def test_a_member_goes_on_without_a_router_that_refuses_it() -> None:
    async def main() -> None:
        world = World()
        await world.start()
        world.router.refuses = WrongCluster("somebody else's router is there now")
        world.router.lists.put_nowait(None)
        await asyncio.sleep(30)
        assert world.task is not None
        assert not world.task.done()
        assert len(world.router.joins) < 25
        world.router.refuses = None
        await asyncio.sleep(5)
        assert world.membership.joined.is_set()

    virtual.run(main)


def test_a_member_ends_when_it_is_fenced() -> None:
    async def main() -> None:
        world = World("second:1")
        await world.start()
        world.router.refuses = Fenced("another decode-0 has taken the place of this one")
        world.router.lists.put_nowait(None)
        assert world.task is not None
        with pytest.raises(Fenced):
            await world.task
        assert not world.membership.joined.is_set()
        beats = len(world.others["second:1"].beats)
        await asyncio.sleep(10)
        assert len(world.others["second:1"].beats) == beats

    virtual.run(main)


@pytest.mark.parametrize("turns", range(12))
def test_it_ends_when_told_to_also_while_a_router_is_being_lost(turns: int) -> None:
    async def main() -> None:
        world = World()
        await world.start()
        assert world.task is not None
        await world.router.lists.put(None)
        for _ in range(turns):
            await asyncio.sleep(0)
        world.task.cancel()
        done, _ = await asyncio.wait([world.task], timeout=5.0)
        assert done

    virtual.run(main, 1)
