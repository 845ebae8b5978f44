"""The processes of :mod:`bench.hosts.joins`: the router's registry, and many real memberships, over TCP."""

import asyncio
import gc
import sys
from typing import Any

import uvloop

from bench.common.lines import cpu_s, listen, say
from router.fleet.members import MemberRegistry
from tracehaul.rpc.member import new_generation
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime import clock
from tracehaul.wire.cluster import MemberRole, Members, NodeInfo, NodeLoad, Rates, Role, Viewer, WorkerLimits
from tracehaul.wire.ids import BlockHash, NodeId

STORE_OF, PREFILL_OF = 10, (1, 4, 6, 8)
"""Of ten nodes in a row the first is a store, four are prefill workers, and the others decode workers."""


def role_of(number: int) -> Role:
    """What that node of the fleet is."""
    turn = number % STORE_OF
    return "store" if turn == 0 else "prefill" if turn in PREFILL_OF else "decode"


def node_of(number: int) -> NodeInfo:
    """That node, with all that a real one says of itself."""
    role = role_of(number)
    name, host = f"{role}-{number}", f"host-{number // 8}.cluster.example"
    said: dict[str, Any] = {
        "started_s": clock.wall_s(),
        "version": "0.1.0",
        "host": host,
        "metrics": f"10.1.{number // 250}.{number % 250}:9100",
        "log": f"/var/lib/tracehaul/logs/{name}.log",
    }
    if role != "store":
        said |= {
            "model": "Qwen/Qwen3-0.6B",
            "root": BlockHash(16 * b"r"),
            "block_tokens": 16,
            "context_max": 131_072,
            "engine": "native",
            "features": ("constraints", "prompt_logprobs", "recall"),
            "limits": WorkerLimits(262_144, 64, 256, 512, 256, 4.0),
            "rates": Rates(4.1e-4, 1.9e-7, 0.031, 1.3e-5),
        }
    return NodeInfo(NodeId(name), new_generation(), role, f"10.1.{number // 250}.{number % 250}:7100", **said)


def load_of(role: MemberRole) -> NodeLoad:
    """As a busy node says it."""
    if role == "store":
        return NodeLoad(blocks=70_123, bytes_used=60 << 30, bytes_max=64 << 30, disk_blocks=1 << 20, disk_block_s=2e-4)
    return NodeLoad(
        running=17,
        waiting=3,
        bytes_used=30 << 30,
        bytes_max=40 << 30,
        free_tokens=9_123,
        token_s=4.1e-4,
        pair_s=1.9e-7,
        decode_s=0.031,
        pull_token_s=1.3e-5,
    )


class Nodes:
    """Some of the fleet's nodes."""

    def __init__(self, router: str, first: int, count: int, total: int) -> None:
        self._infos = [node_of(number) for number in range(first, first + count)]
        self._everybody = [node_of(number) for number in range(total)]
        self._router = router
        self._short: set[NodeId] = set()
        """Those that do not know everybody whom they need."""
        self._whole = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def answer(self, command: dict[str, Any]) -> Any:
        match command["do"]:
            case "join":
                return await self.join()
            case "leave":
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
                return None
            case other:
                raise ValueError(other)

    async def join(self) -> float:
        """Returns the CPU seconds it took, once each node is a member and knows everybody whom it needs."""
        began_s = cpu_s()
        network = TcpNetwork()
        needed = {
            viewer: sum(viewer.needs(other) for other in self._everybody)
            for viewer in {Viewer(info.role, info.pool) for info in self._infos}
        }
        for info in self._infos:
            self._short.add(info.node)
            take = self._taker(info, needed[Viewer(info.role, info.pool)])
            load = load_of(info.role)
            membership = Membership(Peers(network), [self._router], info, lambda load=load: load, take)
            self._tasks.append(asyncio.create_task(membership.run()))
        await self._whole.wait()
        return cpu_s() - began_s

    def _taker(self, info: NodeInfo, needed: int) -> Any:
        def take(members: Members) -> None:
            if len(members.nodes) == needed:
                self._short.discard(info.node)
                if not self._short:
                    self._whole.set()

        return take


async def _be_router() -> None:
    registry = MemberRegistry(lambda stores: None)
    server = await TcpNetwork().listen("127.0.0.1:0", registry)
    gc.freeze()
    say(server.address)

    async def look(command: dict[str, Any]) -> list[float]:
        await asyncio.sleep(command["wait_s"])
        return [len(registry.infos()), clock.perf_s(), cpu_s()]

    await listen(look)
    await server.close()


async def _be_nodes(router: str, first: int, count: int, total: int) -> None:
    nodes = Nodes(router, first, count, total)
    gc.freeze()
    say("ready")
    await listen(nodes.answer)


if __name__ == "__main__":
    kind, *words = sys.argv[1:]
    uvloop.run(_be_router() if kind == "router" else _be_nodes(words[0], *map(int, words[1:])))
