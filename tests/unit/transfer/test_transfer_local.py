"""The in-process transport's link, the wait for landings, and the choice of plane."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from tracehaul.transfer.base import Copy, TransferTimedOut
from tracehaul.transfer.landing import land
from tracehaul.transfer.lanes import Cutter
from tracehaul.transfer.local import Landing, LocalHub, LocalTransfer
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.plane import Plane, choose
from tracehaul.transfer.region import Registered
from tracehaul.wire.blocks import RegionDescriptor
from tracehaul.wire.errors import TransferError, TransferLost


class ScriptedLink:
    """Every transfer takes ``delay_s`` and ends as ``landing``; remembers what it carried."""

    def __init__(self, landing: Landing, delay_s: float = 0.0) -> None:
        self.landing = landing
        self.delay_s = delay_s
        self.carried: list[tuple[str, str, int]] = []

    async def carry(self, source: str, target: str, nbytes: int) -> Landing:
        self.carried.append((source, target, nbytes))
        await asyncio.sleep(self.delay_s)
        return self.landing


def node(hub: LocalHub, owner: str, fill: bytes) -> tuple[LocalTransfer, Registered]:
    transfer = LocalTransfer(owner, hub)
    memory = allocate(4096, "test")
    memory.buffer[:] = fill * 4096
    return transfer, transfer.register(memory)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


def test_the_link_is_asked_with_the_direction_of_the_bytes() -> None:
    async def main() -> None:
        link = ScriptedLink(Landing())
        hub = LocalHub(link)
        a, ra = node(hub, "a#1", b"a")
        _, rb = node(hub, "b#1", b"b")
        await a.read(rb.descriptor, ra, [Copy(0, 0, 10), Copy(20, 20, 5)], timeout_s=1)
        await a.write(rb.descriptor, ra, [Copy(30, 30, 7)], timeout_s=1)
        assert link.carried == [("b#1", "a#1", 15), ("a#1", "b#1", 7)]

    run(main())


def test_a_late_landing_settles_when_it_lands() -> None:
    async def main() -> None:
        hub = LocalHub(ScriptedLink(Landing(), delay_s=0.05))
        a, ra = node(hub, "a#1", b"a")
        _, rb = node(hub, "b#1", b"b")
        with pytest.raises(TransferTimedOut) as failure:
            await a.read(rb.descriptor, ra, [Copy(0, 0, 10)], timeout_s=0.01)
        assert bytes(ra.buffer[:10]) == b"a" * 10
        rb.buffer[:10] = b"c" * 10  # the bytes are those of the moment of landing
        assert not failure.value.settled.done()
        await failure.value.settled
        assert bytes(ra.buffer[:11]) == b"c" * 10 + b"a"

    run(main())


def test_a_flipped_byte_lands_in_the_right_copy() -> None:
    async def main() -> None:
        hub = LocalHub(ScriptedLink(Landing(flipped_byte=12)))
        a, ra = node(hub, "a#1", b"a")
        _, rb = node(hub, "b#1", b"\x00")
        await a.read(rb.descriptor, ra, [Copy(0, 0, 10), Copy(50, 0, 10)], timeout_s=1)
        assert bytes(ra.buffer[:10]) == bytes(10)
        assert bytes(ra.buffer[50:60]) == bytes(2) + b"\xff" + bytes(7)

    run(main())


def test_a_lost_transfer_lands_nothing() -> None:
    async def main() -> None:
        hub = LocalHub(ScriptedLink(Landing(lost=True)))
        a, ra = node(hub, "a#1", b"a")
        _, rb = node(hub, "b#1", b"b")
        with pytest.raises(TransferLost):
            await a.read(rb.descriptor, ra, [Copy(0, 0, 10)], timeout_s=1)
        assert bytes(ra.buffer[:10]) == b"a" * 10

    run(main())


def test_a_peer_removed_while_bytes_travel_is_lost() -> None:
    async def main() -> None:
        hub = LocalHub(ScriptedLink(Landing(), delay_s=0.02))
        a, ra = node(hub, "a#1", b"a")
        _, rb = node(hub, "b#1", b"b")
        work = asyncio.create_task(a.write(rb.descriptor, ra, [Copy(0, 0, 10)], timeout_s=1))
        await asyncio.sleep(0)
        hub.remove("b#1")
        with pytest.raises(TransferLost):
            await work
        assert bytes(rb.buffer[:10]) == b"b" * 10

    run(main())


def test_cancelling_waits_until_the_bytes_have_settled() -> None:
    async def main() -> None:
        hub = LocalHub(ScriptedLink(Landing(), delay_s=0.03))
        a, ra = node(hub, "a#1", b"a")
        _, rb = node(hub, "b#1", b"b")
        work = asyncio.create_task(a.read(rb.descriptor, ra, [Copy(0, 0, 10)], timeout_s=5))
        await asyncio.sleep(0.001)
        work.cancel()
        await asyncio.sleep(0.001)
        assert not work.done()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert bytes(ra.buffer[:10]) == b"b" * 10

    run(main())


def test_cancelling_ends_at_the_deadline_with_the_promise_to_settle() -> None:
    async def main() -> None:
        stops: list[None] = []
        work: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(land(work, 0.02, "x", lambda: stops.append(None)))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(TransferTimedOut) as failure:
            await waiting
        assert len(stops) == 1
        assert not failure.value.settled.done()
        work.set_exception(TransferLost("late"))
        await failure.value.settled

    run(main())


def test_work_done_in_time_ends_as_it_ended() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        good: asyncio.Future[None] = loop.create_future()
        good.set_result(None)
        await land(good, 0.0, "x", lambda: None)
        bad: asyncio.Future[None] = loop.create_future()
        bad.set_exception(TransferError("no"))
        with pytest.raises(TransferError, match="no"):
            await land(bad, 1.0, "x", lambda: None)

    run(main())


def test_pieces_cover_the_copies_within_their_limits() -> None:
    copies = [Copy(0, 100, 10), Copy(50, 200, 0), Copy(60, 300, 25), Copy(90, 400, 3)]
    left, cut = Cutter(copies), []
    while not left.empty:
        cut.append(left.take(nbytes_max=16, copies_max=2))
    assert cut == [
        [Copy(0, 100, 10), Copy(60, 300, 6)],
        [Copy(66, 306, 16)],
        [Copy(82, 322, 3), Copy(90, 400, 3)],
    ]
    assert Cutter([Copy(1, 1, 0)]).empty


class FixedTransfer(LocalTransfer):
    """Claims a kind, and to reach the owners it is given."""

    def __init__(self, kind: str, owners: set[str]) -> None:
        super().__init__("me#1", LocalHub())
        self._kind = kind
        self._owners = owners

    @property
    def kind(self) -> str:
        return self._kind

    def reaches(self, remote: RegionDescriptor) -> bool:
        return remote.owner in self._owners


def test_choose_takes_the_cheapest_that_reaches() -> None:
    shm, nixl = FixedTransfer("shm", {"near#1"}), FixedTransfer("nixl", {"near#1", "far#1"})
    region = node(LocalHub(), "x#1", b"x")[1]
    planes = [Plane(nixl, region), Plane(shm, region)]

    def offered(owner: str, *kinds: str) -> list[RegionDescriptor]:
        return [RegionDescriptor(kind=kind, owner=owner, nbytes=1, payload=b"") for kind in kinds]

    plane, remote = choose(planes, offered("near#1", "nixl", "shm"))
    assert (plane.transfer, remote.kind) == (shm, "shm")
    plane, remote = choose(planes, offered("far#1", "shm", "nixl", "pigeon"))
    assert (plane.transfer, remote.kind) == (nixl, "nixl")
    with pytest.raises(TransferError, match=r"lost#1.*it offers shm, this process has nixl, shm"):
        choose(planes, offered("lost#1", "shm"))
    with pytest.raises(TransferError):
        choose([], [])
