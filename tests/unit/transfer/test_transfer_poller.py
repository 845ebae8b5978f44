"""The thread that drives an agent: when it dies, whoever depends on it learns so."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest

from tracehaul.transfer.base import Copy
from tracehaul.transfer.exchange import Waking
from tracehaul.transfer.memory import allocate
from tracehaul.transfer.notes import Triples
from tracehaul.transfer.polled import PolledTransfer
from tracehaul.wire.errors import TransferError


class IdleAgent:
    """Knows everybody; what is posted never ends. Fails when told to."""

    def __init__(self) -> None:
        self.failing = threading.Event()
        self.closed = False

    @property
    def wake_fds(self) -> Sequence[int]:
        return ()

    def arm(self) -> Waking:
        return "unknown"

    def register(self, address: int, nbytes: int) -> bytes:
        return b"metadata"

    def add_peer(self, name: str, metadata: bytes) -> None:
        pass

    def remove_peer(self, name: str) -> None:
        pass

    def post(self, way: Literal["read", "write"], peer: str, ours: Triples, theirs: Triples, note: bytes) -> int:
        return 1

    def poll(self, handle: int) -> bool:
        return False

    def release(self, handle: int) -> None:
        pass

    def notify(self, peer: str, note: bytes) -> None:
        pass

    def heard(self) -> list[tuple[str, bytes]]:
        if self.failing.is_set():
            raise TransferError("the library has failed")
        return []

    def close(self) -> None:
        self.closed = True


def play(case: Callable[[PolledTransfer, IdleAgent, PolledTransfer], Any]) -> None:
    """Run a case with a transport, its agent, and a peer."""

    async def main() -> None:
        agent = IdleAgent()
        transfer, peer = (
            PolledTransfer("nixl", name, "read", lambda a=a: a)
            for name, a in (("us#1", agent), ("peer#1", IdleAgent()))
        )
        async with asyncio.timeout(10):
            await case(transfer, agent, peer)
            await transfer.close()
            await peer.close()

    asyncio.run(main())


def test_a_thread_that_dies_ends_transfers_and_says_so() -> None:
    async def case(transfer: PolledTransfer, agent: IdleAgent, peer: PolledTransfer) -> None:
        memory = allocate(4096, "test")
        ours, theirs = transfer.register(memory), peer.register(memory)
        watching = asyncio.ensure_future(transfer.broken())
        reading = asyncio.ensure_future(transfer.read(theirs.descriptor, ours, [Copy(0, 0, 9)], timeout_s=9))
        await asyncio.sleep(0.05)
        assert not watching.done()
        assert not reading.done()
        agent.failing.set()
        with pytest.raises(TransferError, match="the library has failed"):
            await watching
        with pytest.raises(TransferError, match="failed"):
            await reading
        with pytest.raises(TransferError):
            await transfer.read(theirs.descriptor, ours, [Copy(0, 0, 9)], timeout_s=9)
        assert agent.closed

    play(case)


def test_closing_is_no_failure_and_a_watch_may_be_given_up() -> None:
    async def case(transfer: PolledTransfer, agent: IdleAgent, peer: PolledTransfer) -> None:
        given_up, watching = (asyncio.ensure_future(transfer.broken()) for _ in range(2))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        await transfer.close()
        await watching

    play(case)
