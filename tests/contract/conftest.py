"""What tests of who is let in share: a CA, another, and both kinds of loop."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from cluster.security.ca import Issued, ensure_ca, issue
from cluster.security.laying import lay
from router.fleet import gate
from tests.postgres import Postgres, postgres
from tracehaul.rpc import membership
from tracehaul.rpc import tcp as rpc_tcp
from tracehaul.rpc.base import CallContext, Network
from tracehaul.runtime import clock
from tracehaul.runtime.credentials import Credentials
from tracehaul.transfer import tcp_serving
from tracehaul.wire.base import Ok
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.steps import PrefillProgress

HOST = "127.0.0.1"
LISTEN = f"{HOST}:0"


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres]:
    """For tests of the group ``postgres``."""
    with postgres() as running:
        yield running


Main = Callable[[], Coroutine[Any, Any, None]]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Main], None]:
    """Runs a test's main function."""

    def run(main: Main) -> None:
        async def limited() -> None:
            async with asyncio.timeout(60):
                await main()

        request.param(limited())

    return run


class Authority:
    """A CA, and the secrets of those that it certified."""

    def __init__(self, folder: Path, cluster: str = "test") -> None:
        self.folder = folder / "authority"
        self._secrets = folder
        ensure_ca(self.folder, cluster, now_s=clock.wall_s())

    def issue(self, name: str, *, days: int = 90, ago_s: float = 0.0, nodes: tuple[str, ...] = ()) -> Issued:
        return issue(self.folder, name, [HOST], now_s=clock.wall_s() - ago_s, days=days, nodes=nodes)

    def secrets(self, name: str) -> Path:
        return self._secrets / name

    def credentials(self, name: str, **how: Any) -> Credentials:
        """Newly issued."""
        lay(self.secrets(name), self.issue(name, **how))
        return Credentials(self.secrets(name))


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said seldom is said in each test."""
    for seldom in (rpc_tcp._seldom, gate._seldom, tcp_serving._seldom, membership.seldom):
        monkeypatch.setattr(seldom, "_said", {})


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "theirs", "another")


class Echo:
    """Keeps what was proven of who called last."""

    def __init__(self) -> None:
        self.names: frozenset[str] | None = None

    async def call(self, request: Request, context: CallContext) -> Reply:
        self.names = context.names
        return Ok()

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        self.names = context.names
        yield PrefillProgress(1)

    def disconnected(self, peer: str) -> None:
        pass


@contextlib.asynccontextmanager
async def listening(network: Network, service: Any) -> AsyncGenerator[str]:
    server = await network.listen(LISTEN, service)
    try:
        yield server.address
    finally:
        await server.close()
