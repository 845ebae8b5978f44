"""What tests of plugins share: a router, a store in a process of its own, and modules shaped as the engines' own.

The engines are not installed where tests run. What stands for them has the names and the parameters of SGLang 0.5.23
and vLLM 0.32, taken from their sources.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Coroutine, Generator
from pathlib import Path
from typing import Any

import msgspec

from engines.blocks.config import EngineConfig
from kvstore.config import StoreConfig
from router.fleet.members import MemberRegistry
from tracehaul.rpc.membership import Membership
from tracehaul.rpc.peers import Peers
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.wire.cluster import NodeInfo, NodeLoad
from tracehaul.wire.ids import NodeId

STORE = Path(__file__).parent / "process" / "store_process.py"
SLOT_BYTES = 8192


class Fleet:
    """A router on a thread, and one store process, which it speaks for."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.registry = MemberRegistry(lambda stores: None)
        self._server = self.do(TcpNetwork().listen("127.0.0.1:0", self.registry))
        self.router = self._server.address
        self._peers = Peers(TcpNetwork())
        self._member: asyncio.Task[None] | None = None
        self._generation = 0
        self.process: subprocess.Popen[bytes] | None = None

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def start_store(self, slots: int = 64) -> None:
        """One life; its predecessor, if any, is no member any more."""
        self.stop_store()
        self._generation += 1
        config = StoreConfig(slots * SLOT_BYTES, SLOT_BYTES)
        command = [sys.executable, str(STORE), "store-0", str(self._generation), msgspec.json.encode(config).decode()]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ})
        assert self.process.stdout is not None
        info = msgspec.json.decode(self.process.stdout.readline(), type=NodeInfo)
        self.do(self._join(info))

    async def _join(self, info: NodeInfo) -> None:
        membership = Membership(self._peers, [self.router], info, NodeLoad, lambda members: None)
        self._member = self.loop.create_task(membership.run())
        await membership.joined.wait()

    async def _leave(self) -> None:
        if self._member is not None:
            self._member.cancel()
            await asyncio.gather(self._member, return_exceptions=True)
            self._member = None

    def stop_store(self) -> None:
        self.kill()
        self.do(self._leave())

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def members(self) -> dict[NodeId, NodeInfo]:
        async def infos() -> tuple[NodeInfo, ...]:
            return self.registry.infos()

        return {info.node: info for info in self.do(infos())}

    def config(self, **changes: Any) -> EngineConfig:
        said: dict[str, Any] = {
            "routers": (self.router,),
            "name": "engine",
            "revision": "r1",
            "transports": ("shm",),
            "staging_bytes": 32 * SLOT_BYTES,
            "timeout_s": 2.0,
        }
        return EngineConfig(**{**said, **changes})

    def extra(self, **changes: Any) -> dict[str, Any]:
        """As an engine hands it to a plugin."""
        return {"tracehaul": msgspec.to_builtins(self.config(**changes))}

    def close(self) -> None:
        self.stop_store()

        async def end() -> None:
            await self._peers.close()
            await self._server.close()

        self.do(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)


@contextlib.contextmanager
def fleet() -> Generator[Fleet]:
    """One with a store."""
    made = Fleet()
    try:
        made.start_store()
        yield made
    finally:
        made.close()
