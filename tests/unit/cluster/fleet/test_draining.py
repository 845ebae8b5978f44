"""A drain that leads to nothing is taken back: no store is left draining."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from cluster.config import ClusterConfig
from cluster.fleet.config import HostConfig, HostNodes
from cluster.fleet.connection import Done, HostFault
from cluster.fleet.draining import drain, given_away
from cluster.fleet.opened import Opened
from cluster.fleet.survey import Hand
from cluster.hosts.orders import HostReport, NodeReport
from cluster.rundir import ClusterFault

STORES = ("store-a-0", "store-b-0")


class Way:
    """A host that does as it is told, and can refuse to drain one store, or take for ever."""

    def __init__(self, refuses: str = "", hangs: str = "") -> None:
        self.draining: set[str] = set()
        self.asked = asyncio.Event()
        self.pids = {name: number for number, name in enumerate(STORES, start=1)}
        self._refuses = refuses
        self._hangs = hangs

    async def run(self, command: Sequence[str], stdin: bytes | Path = b"", timeout_s: float = 60.0) -> Done:
        words = command[-1].split()
        if "drain" in words:
            name = words[words.index("drain") + 1]
            if "--cancel" in words:
                self.draining.discard(name)
                return Done(0, b"", b"")
            self.draining.add(name)
            if name == self._hangs:
                self.asked.set()
                await asyncio.sleep(3600)
            if name == self._refuses:
                return Done(1, b"", b"tracehaul: nobody has room")
        elif "status" in words:
            nodes = tuple(NodeReport(name, "store", "running", pid=pid) for name, pid in self.pids.items())
            return Done(0, msgspec.json.encode(HostReport("a", "own", nodes, "")), b"")
        return Done(0, b"", b"")

    @asynccontextmanager
    async def hold(self, command: Sequence[str], timeout_s: float = 30.0) -> AsyncGenerator[bytes]:
        yield b""

    async def address(self) -> str:
        return ""


def fleet_of(way: Way) -> Opened:
    host = HostConfig("a", HostNodes(router=1, store=3), address="10.0.0.1")
    return Opened(ClusterConfig(hosts=(host,)), [Hand(host, way)])


def test_stores_serve_on_where_one_cannot_be_drained() -> None:
    way = Way(refuses="store-b-0")
    fleet = fleet_of(way)
    with pytest.raises(ClusterFault, match=r"blocks stay where they are: nobody has room; .* tracehaul stop a"):
        asyncio.run(drain(STORES, fleet, fleet.hands))
    assert way.draining == set()


def test_stores_serve_on_where_who_waits_for_the_drain_leaves() -> None:
    async def leave(way: Way) -> None:
        fleet = fleet_of(way)
        waiting = asyncio.create_task(drain(STORES, fleet, fleet.hands))
        await way.asked.wait()
        assert way.draining == set(STORES)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    way = Way(hangs="store-b-0")
    asyncio.run(leave(way))
    assert way.draining == set()


def test_of_stores_given_away_those_that_were_not_started_anew_serve_on() -> None:
    async def restart(way: Way) -> None:
        fleet = fleet_of(way)
        async with given_away(fleet, dict.fromkeys(STORES, fleet.hands[0]), lambda line: None):
            assert way.draining == set(STORES)
            way.pids["store-a-0"] = 7
            raise HostFault("the other does not end")

    way = Way()
    with pytest.raises(HostFault, match="does not end"):
        asyncio.run(restart(way))
    assert way.draining == {"store-a-0"}  # the process that was told so has ended
