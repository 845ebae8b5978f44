"""What a router asks of a node that wants to join, and how lives of one name are told apart, under virtual time."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from router.fleet.epochs import Epochs
from router.fleet.members import LOST_AFTER_S, SUSPECT_AFTER_S, MemberRegistry, Terms
from sim import loop as virtual
from tracehaul.rpc.base import NO_CONTEXT
from tracehaul.rpc.local import LocalNetwork
from tracehaul.rpc.membership import TAKEN_S, Membership
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock
from tracehaul.wire.cluster import Join, Members, NodeInfo, NodeLoad
from tracehaul.wire.errors import Fenced, NameTaken, WrongCluster, WrongVersion
from tracehaul.wire.ids import Epoch, Generation, NodeId
from tracehaul.wire.version import WIRE, Version

ROUTERS = ("router:1", "second:1")


class Node:
    """One life of a store node, at an address of its own."""

    def __init__(self, world: "World", name: str, generation: int) -> None:
        address = f"{name}.{generation}:1"
        self.info = NodeInfo(NodeId(name), Generation(generation), "store", address, host=f"host-{generation}")
        self.load = NodeLoad()
        self.seen: list[Members] = []
        peers = Peers(world.network.at(address))
        self.membership = Membership(peers, world.routers, self.info, lambda: self.load, self.seen.append)
        self.task = asyncio.create_task(self.membership.run())


class World:
    def __init__(self, routers: int = 1) -> None:
        self.network = LocalNetwork()
        self.routers = ROUTERS[:routers]
        self.registries: dict[str, MemberRegistry] = {}
        self.nodes: list[Node] = []
        self.wall_s = 1000.0

    async def start(self, *names: str) -> list[Node]:
        for router in self.routers:
            await self.start_router(router)
        nodes = [self.node(name) for name in names]
        await asyncio.sleep(LOST_AFTER_S + 1.0)
        return nodes

    async def start_router(self, address: str, epochs: Epochs | None = None) -> MemberRegistry:
        terms = Terms(cluster="ours", epochs=epochs or Epochs(), wall_s=lambda: self.wall_s)
        registry = self.registries[address] = MemberRegistry(lambda _: None, terms)
        await self.network.at(address).listen(address, registry)
        return registry

    def node(self, name: str, generation: int = 1) -> Node:
        node = Node(self, name, generation)
        self.nodes.append(node)
        return node

    def freeze(self, node: Node) -> None:
        self.network.freeze(node.info.address)

    def thaw(self, node: Node) -> None:
        self.network.thaw(node.info.address)

    def members(self, router: str = ROUTERS[0]) -> list[str]:
        return [f"{info.node}.{info.generation}" for info in self.registries[router].infos()]


def play(case: Callable[[World], Awaitable[None]], routers: int = 1) -> None:
    async def main() -> None:
        world = World(routers)
        await case(world)
        for node in world.nodes:
            node.task.cancel()
        await asyncio.gather(*(node.task for node in world.nodes), return_exceptions=True)

    virtual.run(main)


def known(node: Node) -> list[str]:
    return [f"{info.node}.{info.generation}" for info in node.membership.members.nodes]


def lists_without(node: Node, other: str) -> int:
    """How often it was told of a list on which another was not, after one on which it was."""
    there = [any(info.node == other for info in members.nodes) for members in node.seen]
    return there[there.index(True) :].count(False)


INFO = NodeInfo(NodeId("store-0"), Generation(1), "store", "store-0:1")


@pytest.mark.parametrize(
    ("join", "error", "says"),
    [
        (
            Join(INFO, cluster="theirs", wire=WIRE),
            WrongCluster,
            "store-0 belongs to cluster 'theirs', not to 'ours'",
        ),
        (Join(INFO, cluster="ours"), WrongVersion, f"store-0 speaks wire version 1.0, and this cluster {WIRE}"),
        (Join(INFO, cluster="ours", wire=Version(3, 0)), WrongVersion, "speaks wire version 3.0"),
    ],
)
def test_who_belongs_elsewhere_or_speaks_otherwise_is_refused_in_a_line(
    join: Join, error: type[Exception], says: str
) -> None:
    async def case(world: World) -> None:
        await world.start()
        with pytest.raises(error, match=says):
            await anext(world.registries[ROUTERS[0]].stream(join, NO_CONTEXT))
        assert world.members() == []

    play(case)


@pytest.mark.parametrize("join", [Join(INFO, wire=Version(2, 7)), Join(INFO, cluster="ours", wire=WIRE)])
def test_minor_versions_and_nodes_that_name_no_cluster_are_taken(join: Join) -> None:
    async def case(world: World) -> None:
        await world.start()
        replies = world.registries[ROUTERS[0]].stream(join, NO_CONTEXT)
        assert isinstance(await anext(replies), Members)
        assert world.members() == ["store-0.1"]
        await replies.aclose()
        assert world.members() == []

    play(case)


def test_who_cannot_serve_gets_no_work_from_its_join_on_and_is_shown_as_joining() -> None:
    async def case(world: World) -> None:
        (node,) = await world.start("store-0")
        registry = world.registries[ROUTERS[0]]
        assert [info.node for info in registry.live("store")] == ["store-0"]
        node.load = NodeLoad(serving=False, fault="store-1: no block came back")
        await asyncio.sleep(1.5)
        assert registry.live("store") == []
        (status,) = registry.statuses()
        assert (status.health, status.load.fault) == ("joining", "store-1: no block came back")
        assert world.members() == ["store-0.1"]
        node.load = NodeLoad()
        await asyncio.sleep(1.5)
        assert [status.health for status in registry.statuses()] == ["ready"]
        node.task.cancel()
        await asyncio.sleep(0.5)
        replies = registry.stream(Join(INFO, NodeLoad(serving=False), wire=WIRE), NO_CONTEXT)
        await anext(replies)
        assert [status.health for status in registry.statuses()] == ["joining"]
        assert registry.live("store") == []
        await replies.aclose()

    play(case)


def test_a_second_node_of_a_name_that_is_heard_ends_with_a_line_that_says_where_the_other_is() -> None:
    async def case(world: World) -> None:
        (first,) = await world.start("store-0")
        second = world.node("store-0", 2)
        began_s = clock.now_s()
        async with asyncio.timeout(60.0):
            await asyncio.wait([second.task])
        with pytest.raises(NameTaken, match=r"another store-0 is alive at store-0\.1:1 on host-1, heard .* ago"):
            await second.task
        assert TAKEN_S <= clock.now_s() - began_s <= TAKEN_S + 2.0
        assert world.members() == ["store-0.1"]
        assert not first.task.done()

    play(case)


def test_who_replaces_a_frozen_life_gets_the_name_once_that_is_suspect_and_keeps_it() -> None:
    """Whatever the clocks of the two say: only the router's is asked."""

    async def case(world: World) -> None:
        first, other = await world.start("store-0", "store-1")
        world.wall_s = 10.0
        world.freeze(first)
        second = world.node("store-0", 2)
        await asyncio.sleep(SUSPECT_AFTER_S - 1.5)
        assert world.members() == ["store-0.1", "store-1.1"]
        await asyncio.sleep(3.0)
        assert world.members() == ["store-0.2", "store-1.1"]
        assert known(other) == ["store-0.2", "store-1.1"]
        assert second.membership.info.epoch > first.membership.info.epoch
        world.thaw(first)
        await asyncio.sleep(5.0)
        assert first.task.done()
        with pytest.raises(Fenced, match="another store-0 has taken the place of this one"):
            await first.task
        await asyncio.sleep(30.0)
        assert world.members() == ["store-0.2", "store-1.1"]
        assert second.membership.joined.is_set()

    play(case)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("thaws_first", [False, True])
def test_who_thaws_after_the_router_was_restarted_is_fenced(kept: bool, thaws_first: bool) -> None:
    async def case(world: World) -> None:
        first, other = await world.start("store-0", "store-1")
        epochs = world.registries[ROUTERS[0]]
        world.freeze(first)
        second = world.node("store-0", 2)
        await asyncio.sleep(10.0)
        world.network.crash(ROUTERS[0])
        marks = epochs._terms.epochs.marks() if kept else []  # pyright: ignore[reportPrivateUsage] - as a file keeps them
        if thaws_first:
            world.freeze(second)
            world.thaw(first)
        await asyncio.sleep(3.0)
        await world.start_router(ROUTERS[0], Epochs(marks))
        await asyncio.sleep(5.0)
        assert first.task.done() == (kept and thaws_first)
        world.thaw(second if thaws_first else first)
        await asyncio.sleep(10.0)
        assert first.task.done()
        with pytest.raises(Fenced):
            await first.task
        assert world.members() == ["store-0.2", "store-1.1"]
        assert known(other) == ["store-0.2", "store-1.1"]
        assert not second.task.done()

    play(case)


def test_an_epoch_of_a_router_that_has_forgotten_all_is_higher_than_those_before() -> None:
    async def case(world: World) -> None:
        (first,) = await world.start("store-0")
        world.freeze(first)
        world.network.crash(ROUTERS[0])
        world.wall_s += 60.0
        await world.start_router(ROUTERS[0])
        second = world.node("store-0", 2)
        await asyncio.sleep(1.0)
        assert second.membership.joined.is_set()
        world.thaw(first)
        await asyncio.sleep(5.0)
        assert first.task.done()
        with pytest.raises(Fenced):
            await first.task
        assert not second.task.done()

    play(case)


def test_lives_with_one_epoch_from_two_routers_are_decided_alike() -> None:
    async def case(world: World) -> None:
        await world.start()
        registries = [world.registries[router] for router in ROUTERS]
        lives = [INFO, NodeInfo(NodeId("store-0"), Generation(2), "store", "store-0:2")]
        streams = [
            registry.stream(Join(life, wire=WIRE), NO_CONTEXT) for registry, life in zip(registries, lives, strict=True)
        ]
        replies = [await anext(stream) for stream in streams]
        epochs = [reply.epoch for reply in replies if isinstance(reply, Members)]
        assert epochs[0] == epochs[1] == 1000
        lives = [NodeInfo(life.node, life.generation, "store", life.address, epoch=Epoch(1000)) for life in lives]
        with pytest.raises(Fenced):
            await anext(registries[1].stream(Join(lives[0], wire=WIRE), NO_CONTEXT))
        crossed = registries[0].stream(Join(lives[1], wire=WIRE), NO_CONTEXT)
        await anext(crossed)
        with pytest.raises(Fenced):
            await anext(streams[0])
        assert world.members(ROUTERS[0]) == world.members(ROUTERS[1]) == ["store-0.2"]
        await crossed.aclose()
        await streams[1].aclose()

    play(case, routers=2)


def test_a_router_that_is_restarted_with_an_empty_list_takes_nobody_off() -> None:
    async def case(world: World) -> None:
        first, second, third = await world.start("store-0", "store-1", "store-2")
        world.freeze(third)
        await asyncio.sleep(1.0)
        world.network.crash(ROUTERS[0])
        await asyncio.sleep(30.0)
        assert known(first) == ["store-0.1", "store-1.1", "store-2.1"]
        await world.start_router(ROUTERS[0])
        await asyncio.sleep(5.0)
        assert world.members() == ["store-0.1", "store-1.1"]
        assert known(first) == known(second) == ["store-0.1", "store-1.1", "store-2.1"]
        await asyncio.sleep(LOST_AFTER_S)
        assert known(first) == known(second) == ["store-0.1", "store-1.1"]
        assert lists_without(first, "store-1") == 0
        world.thaw(third)
        await asyncio.sleep(5.0)
        assert known(first) == known(third) == ["store-0.1", "store-1.1", "store-2.1"]

    play(case)


def test_one_of_two_routers_dies_and_everybody_stays_and_newcomers_are_known() -> None:
    async def case(world: World) -> None:
        first, second = await world.start("store-0", "store-1")
        world.network.crash(ROUTERS[0])
        await asyncio.sleep(20.0)
        third = world.node("store-2")
        await asyncio.sleep(3.0)
        assert known(first) == known(second) == known(third) == ["store-0.1", "store-1.1", "store-2.1"]
        assert lists_without(first, "store-1") == lists_without(second, "store-0") == 0
        second.task.cancel()
        await asyncio.sleep(1.0)
        assert known(first) == known(third) == ["store-0.1", "store-2.1"]
        await world.start_router(ROUTERS[0])
        await asyncio.sleep(3.0)
        assert world.members(ROUTERS[0]) == world.members(ROUTERS[1]) == ["store-0.1", "store-2.1"]

    play(case, routers=2)


def stop_the_router(case: Callable[[World, Callable[[], None], Callable[[], None]], Awaitable[None]]) -> None:
    """``case`` is given what stops the router's process, and what lets it go on."""

    async def main() -> None:
        world = World()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, virtual.VirtualLoop)
        virtual.PROCESS.set("router")
        await world.start_router(ROUTERS[0])
        virtual.PROCESS.set("")

        def stop() -> None:
            loop.freeze("router")
            world.network.freeze(ROUTERS[0])

        def go_on() -> None:
            world.network.thaw(ROUTERS[0])
            loop.thaw("router")

        await case(world, stop, go_on)
        for node in world.nodes:
            node.task.cancel()
        await asyncio.gather(*(node.task for node in world.nodes), return_exceptions=True)

    virtual.run(main)


def test_a_router_that_stood_still_takes_nobody_off_whom_it_could_not_hear() -> None:
    async def case(world: World, stop: Callable[[], None], go_on: Callable[[], None]) -> None:
        first, second = world.node("store-0"), world.node("store-1")
        await asyncio.sleep(LOST_AFTER_S + 1.0)
        stop()
        await asyncio.sleep(20.0)
        assert not first.membership.joined.is_set()
        world.freeze(second)  # it is later than the other
        go_on()
        await asyncio.sleep(2.0)
        world.thaw(second)
        await asyncio.sleep(5.0)
        assert world.members() == ["store-0.1", "store-1.1"]
        assert known(first) == known(second) == ["store-0.1", "store-1.1"]
        assert lists_without(first, "store-1") == lists_without(second, "store-0") == 0

    stop_the_router(case)


def test_who_gave_up_a_router_that_stood_still_is_not_taken_off_by_those_who_did_not() -> None:
    async def case(world: World, stop: Callable[[], None], go_on: Callable[[], None]) -> None:
        first = world.node("store-0")
        await asyncio.sleep(0.6)
        second = world.node("store-1")
        await asyncio.sleep(11.3)
        stop()
        await asyncio.sleep(3.12)
        assert not first.membership.joined.is_set(), "its heartbeat of 0.1 s after was not answered"
        go_on()
        await asyncio.sleep(0.01)
        world.freeze(first)  # it has left, and does not get to join
        await asyncio.sleep(1.0)
        assert world.members() == ["store-1.1"]
        assert second.membership.joined.is_set()
        assert known(second) == ["store-0.1", "store-1.1"]
        world.thaw(first)
        await asyncio.sleep(LOST_AFTER_S + 5.0)
        assert known(first) == known(second) == ["store-0.1", "store-1.1"]
        assert lists_without(second, "store-0") == 0

    stop_the_router(case)
