"""A process of the measurement of TLS: an end of both planes, plain or under certificates; told by lines what to do."""

import base64
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from bench.common.lines import cpu_s, listen, say
from bench.hosts.tls import BATCH_BYTES, BLOCK_BYTES, PINGS
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime import clock
from tracehaul.runtime.credentials import Credentials
from tracehaul.transfer.base import Copy
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.place import Place
from tracehaul.transfer.tcp import TcpTransfer
from tracehaul.transfer.tcp_proof import Guard
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.blocks import RegionDescriptor
from tracehaul.wire.messages import Reply, Request

TIMEOUT_S = 60.0


class Answering:
    """Says yes to everything."""

    async def call(self, request: Request, context: CallContext) -> Reply:
        return Ok()

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        yield Ok()

    def disconnected(self, peer: str) -> None:
        """Nothing is held for anybody."""


async def main(host: str, data: str, secrets: str) -> None:
    """Does what it is told, until the input ends. ``data``: as in ``[security]``; ``secrets``: empty: all is plain."""
    credentials = Credentials(Path(secrets)) if secrets else None
    network = TcpNetwork(credentials=credentials)
    server = await network.listen(f"{host}:0", Answering())
    peers = Peers(network)
    memory = allocate(BATCH_BYTES, "tls-bench")
    memory.buffer[:] = bytes(range(256)) * (BATCH_BYTES // 256)
    guard = Guard(credentials, data == "tls") if credentials is not None else None
    transfer = TcpTransfer(f"{host}#{clock.wall_ns()}", Place(host), guard)
    region = transfer.register(memory)
    copies = [Copy(at, at, BLOCK_BYTES) for at in range(0, BATCH_BYTES, BLOCK_BYTES)]
    packed = base64.b64encode(msgspec.msgpack.encode(region.descriptor)).decode()
    say({"address": server.address, "descriptor": packed})

    async def act(command: dict[str, Any]) -> dict[str, float]:
        start_s = clock.perf_s()
        match command["do"]:
            case "ping":
                for _ in range(PINGS):
                    await peers.call(command["address"], Ping(), timeout_s=TIMEOUT_S)
            case "get" | "put" as way:
                remote = msgspec.msgpack.decode(base64.b64decode(command["descriptor"]), type=RegionDescriptor)
                move = transfer.read if way == "get" else transfer.write
                await move(remote, region, copies, timeout_s=TIMEOUT_S)
            case other:
                assert other == "nothing", other
        return {"seconds": clock.perf_s() - start_s, "cpu_s": cpu_s()}

    await listen(act)


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
