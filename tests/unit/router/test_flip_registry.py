"""A router agrees to a change of a role, or objects, and knows a worker as what it said last; under virtual time."""

import asyncio
from collections.abc import Callable

import msgspec
import pytest

from router.fleet.flips import FlipConfig
from router.fleet.members import LOST_AFTER_S, MemberRegistry
from sim import loop as virtual
from tracehaul.rpc.base import NO_CONTEXT
from tracehaul.wire.base import Ok
from tracehaul.wire.cluster import Heartbeat, Join, Members, MembersChanged, NodeInfo, NodeLoad, Objection
from tracehaul.wire.errors import WrongNode
from tracehaul.wire.ids import Generation, NodeId
from tracehaul.wire.messages import Reply
from tracehaul.wire.version import WIRE

ROLES = ("prefill", "decode")
NAMES = ("decode-0", "decode-1", "prefill-0", "prefill-1")


def info_of(name: str, role_epoch: int = 0, role: str = "") -> NodeInfo:
    role = role or name.partition("-")[0]
    return NodeInfo(NodeId(name), Generation(1), role, f"{name}:1", engine="native", roles=ROLES, role_epoch=role_epoch)  # type: ignore[arg-type]


class World:
    """Members that say what a test says."""

    def __init__(self) -> None:
        self.registry = MemberRegistry(lambda _: None, None, FlipConfig(cooldown_s=60.0))
        self.told: dict[str, list[Reply]] = {}
        self.tasks: list[asyncio.Task[None]] = []

    def join(self, info: NodeInfo, load: NodeLoad = NodeLoad()) -> None:  # noqa: B008
        async def follow() -> None:
            async for reply in self.registry.stream(Join(info, load, wire=WIRE), NO_CONTEXT):
                self.told.setdefault(f"{info.node} {info.role_epoch}", []).append(reply)

        self.tasks.append(asyncio.create_task(follow()))

    async def beat(self, name: str, role_epoch: int = 0, **load: str) -> Reply:
        beat = Heartbeat(NodeId(name), Generation(1), NodeLoad(**load), role_epoch)  # type: ignore[arg-type]
        return await self.registry.call(beat, NO_CONTEXT)

    async def live(self, seconds: float) -> None:
        for _ in range(int(2 * seconds)):
            await asyncio.sleep(0.5)
            for status in self.registry.statuses():
                await self.beat(status.info.node, status.info.role_epoch, turning=status.load.turning)

    def roles(self, role: str) -> list[str]:
        return [str(info.node) for info in self.registry.live(role)]


def play(case: Callable[[World], object]) -> None:
    async def main() -> None:
        world = World()
        store = NodeInfo(NodeId("store-0"), Generation(1), "store", "store-0:1")
        for info in (store, *map(info_of, NAMES)):
            world.join(info)
        await asyncio.sleep(0.1)
        await world.live(LOST_AFTER_S + 1)
        await case(world)  # type: ignore[misc]
        for task in world.tasks:
            task.cancel()

    virtual.run(main)


def test_who_may_change_is_given_no_work_until_it_has() -> None:
    async def case(world: World) -> None:
        assert await world.beat("decode-1", turning="prefill") == Ok()
        assert world.roles("decode") == ["decode-0"]
        assert [status.health for status in world.registry.statuses()][:2] == ["ready", "turning"]
        assert await world.beat("decode-1", turning="prefill") == Ok(), "it is asked once"
        objection = await world.beat("prefill-0", turning="decode")
        assert isinstance(objection, Objection)
        assert "one changes at a time" in objection.why
        assert world.roles("prefill") == ["prefill-0", "prefill-1"]
        world.join(info_of("decode-1", 1, "prefill"))
        await asyncio.sleep(0.2)
        assert (world.roles("decode"), world.roles("prefill")) == (["decode-0"], ["decode-1", "prefill-0", "prefill-1"])
        # It is told what a prefill worker is told, and decode workers are told of it; its first stream has ended.
        (whole,) = world.told["decode-1 1"]
        assert isinstance(whole, Members)
        assert [info.node for info in whole.nodes] == ["store-0"]
        (*_, change) = world.told["decode-0 0"]
        assert isinstance(change, MembersChanged)
        assert [(info.node, info.role) for info in change.joined] == [("decode-1", "prefill")]
        assert isinstance(await world.beat("prefill-0", turning="decode"), Objection), "a pause follows"
        await world.live(60)
        assert await world.beat("prefill-0", turning="decode") == Ok()

    play(case)


def test_who_keeps_its_role_is_given_work_again() -> None:
    async def case(world: World) -> None:
        assert await world.beat("decode-1", turning="prefill") == Ok()
        await world.live(5)
        assert world.roles("decode") == ["decode-0"]
        assert await world.beat("decode-1") == Ok()
        assert world.roles("decode") == ["decode-0", "decode-1"]
        assert await world.beat("prefill-0", turning="decode") == Ok(), "nothing has changed: no pause"

    play(case)


def test_what_was_said_before_does_not_count_any_more() -> None:
    async def case(world: World) -> None:
        world.join(info_of("decode-1", 1, "prefill"))
        await asyncio.sleep(0.1)
        with pytest.raises(WrongNode):
            await world.beat("decode-1", 0)
        with pytest.raises(WrongNode):
            await anext(world.registry.stream(Join(info_of("decode-1"), wire=WIRE), NO_CONTEXT))
        known = world.registry.known(NodeId("decode-1"))
        assert known is not None
        assert (known.role, known.role_epoch) == ("prefill", 1)
        # Another life begins anew.
        again = msgspec.structs.replace(info_of("decode-1"), generation=Generation(2), epoch=known.epoch + 1)
        world.join(again)
        await asyncio.sleep(0.1)
        assert world.roles("decode") == ["decode-0", "decode-1"]

    play(case)


def test_a_router_that_has_just_started_agrees_to_nothing() -> None:
    async def main() -> None:
        world = World()
        for name in NAMES:
            world.join(info_of(name))
        await asyncio.sleep(0.1)
        assert "does not know yet" in (world.registry.may_flip(NodeId("decode-1"), "prefill") or "")
        assert isinstance(await world.beat("decode-1", turning="prefill"), Objection)
        for task in world.tasks:
            task.cancel()

    virtual.run(main)
