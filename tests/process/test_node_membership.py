"""A real store node and the routers that it joins: what it says of itself, and how it ends when it may not be one."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import httpx
import msgspec
import pytest

from cluster.config import ClusterConfig, PoolConfig
from cluster.launch import free_port
from cluster.plan import NodeSpec, Plan, PoolPlan, save_plan
from cluster.rundir import FAULT_EXIT, FENCED_EXIT, RunDir
from kvstore.config import StoreConfig
from router.fleet.members import MemberRegistry, Terms
from tracehaul import __version__
from tracehaul.model.source import ModelSource
from tracehaul.rpc.base import NO_CONTEXT
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime import clock
from tracehaul.wire.cluster import Join
from tracehaul.wire.ids import Epoch, Generation
from tracehaul.wire.version import WIRE, Version

START_S = 60.0


class Place:
    """A run directory with a plan of two routers and a store, and those routers' registries."""

    def __init__(self, path: Path, name: str) -> None:
        self.run = RunDir(path)
        self.run.create()
        config = ClusterConfig(port=free_port(), store_bytes=1 << 20)
        store = StoreConfig(arena_bytes=1 << 20, slot_bytes=4096)
        pool = PoolPlan("default", ModelSource("m", path, "hf", "llama"), PoolConfig())
        routers = [NodeSpec(f"router-{i}", "router", control_port=free_port()) for i in range(2)]
        plan = Plan(config, (pool,), store, (*routers, NodeSpec("store-0", "store")), name=name)
        save_plan(self.run, plan)
        self.addresses = plan.routers
        self.registries = [MemberRegistry(lambda _: None, Terms(cluster="ours")) for _ in routers]

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncGenerator[asyncio.subprocess.Process]:
        command = ("-m", "cluster.cli", "node", "store-0", "--config", str(self.run.plan_file))
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def joined(self, number: int) -> None:
        async with asyncio.timeout(START_S):
            while not self.registries[number].infos():  # noqa: ASYNC110 - what it waits for is in another process
                await asyncio.sleep(0.05)


def play(path: Path, case: Callable[[Place, asyncio.subprocess.Process], Awaitable[None]], name: str = "ours") -> None:
    async def main() -> None:
        place = Place(path, name)
        servers = [
            await TcpNetwork().listen(address, registry)
            for address, registry in zip(place.addresses, place.registries, strict=True)
        ]
        async with place.started() as process:
            await case(place, process)
        for server in servers:
            await server.close()

    asyncio.run(main())


async def end(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    """Its exit code and the last line that it said."""
    async with asyncio.timeout(START_S):
        _, errors = await process.communicate()
    return process.returncode, errors.decode().splitlines()[-1]


def test_it_joins_every_router_and_says_where_it_is(tmp_path: Path) -> None:
    async def case(place: Place, process: asyncio.subprocess.Process) -> None:
        await place.joined(0)
        await place.joined(1)
        (info,), (same,) = (registry.infos() for registry in place.registries)
        assert info == same
        assert info.version == __version__
        assert info.host
        assert abs(clock.wall_s() - info.started_s) < START_S
        assert Path(info.log) == place.run.log("store-0")
        async with httpx.AsyncClient() as client:
            page = await client.get(f"http://{info.metrics}/metrics")
        assert "tracehaul_node_serving 1.0" in page.text

    play(tmp_path, case)


def test_of_another_cluster_it_ends_with_that_line(tmp_path: Path) -> None:
    async def case(place: Place, process: asyncio.subprocess.Process) -> None:
        assert await end(process) == (FAULT_EXIT, "store-0 belongs to cluster 'theirs', not to 'ours'")

    play(tmp_path, case, name="theirs")


def test_of_another_version_it_ends_with_that_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.fleet.members.WIRE", Version(WIRE.major + 1, 0))

    async def case(place: Place, process: asyncio.subprocess.Process) -> None:
        assert await end(process) == (
            FAULT_EXIT,
            f"store-0 speaks wire version {WIRE}, and this cluster {WIRE.major + 1}.0",
        )

    play(tmp_path, case)


def test_fenced_it_ends_with_a_code_of_its_own(tmp_path: Path) -> None:
    async def case(place: Place, process: asyncio.subprocess.Process) -> None:
        await place.joined(1)
        (info,) = place.registries[1].infos()
        later = msgspec.structs.replace(info, generation=Generation(1), epoch=Epoch(info.epoch + 1))
        replies = place.registries[1].stream(Join(later, cluster="ours", wire=WIRE), NO_CONTEXT)
        await anext(replies)
        assert await end(process) == (FENCED_EXIT, "another store-0 has taken the place of this one")
        assert place.registries[1].infos() == (later,)
        await replies.aclose()

    play(tmp_path, case)
