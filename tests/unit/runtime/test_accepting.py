"""Every connection is taken, or refused and counted; a limit of open files that is too low is said."""

import asyncio
import itertools
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Generator

import pytest

from tracehaul.runtime.accepting import Acceptor, AcceptStats

CLIENTS = 80
ROOM = 24
"""Descriptors that are free."""
CLIENT = f"""
import select, socket, sys
port = int(sys.argv[1])
socks = [socket.create_connection(("127.0.0.1", port)) for _ in range({CLIENTS})]
print("connected", flush=True)
sys.stdin.readline()
closed = 0
for sock in socks:
    sock.setblocking(False)
    try:
        closed += sock.recv(1) == b""
    except BlockingIOError:
        pass
    except OSError:
        closed += 1
print(closed, flush=True)
"""


@pytest.fixture
def few_files() -> Generator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def started(port: int, soft: int | None) -> "subprocess.Popen[str]":
    """The clients; then this process may open few files."""
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if soft is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return client


async def refused(full_at: int | None, soft: int | None) -> tuple[AcceptStats, int]:
    """What was counted, and how many of the clients' connections were closed."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    listener.setblocking(False)
    stats, made = AcceptStats(), [0]

    class Kept(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made[0] += 1
            kept.append(transport)

    kept: list[asyncio.BaseTransport] = []
    full = (lambda: stats.accepted >= full_at) if full_at is not None else (lambda: False)
    acceptor = Acceptor([listener], Kept, stats, what="test", full=full)
    # On a thread: what threads are made of is imported now, while files can be opened.
    client = await asyncio.to_thread(started, listener.getsockname()[1], soft)
    assert client.stdin is not None
    assert client.stdout is not None
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(20):
        while stats.accepted + sum(stats.refused.values()) < CLIENTS:  # noqa: ASYNC110 - counts tell nobody
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        client.stdin.write("\n")
        client.stdin.flush()
        await loop.run_in_executor(None, client.stdout.readline)
        closed = int(await loop.run_in_executor(None, client.stdout.readline))
    assert made[0] == stats.accepted
    for transport in kept:
        transport.abort()  # pyright: ignore[reportAttributeAccessIssue]
    acceptor.close()
    client.communicate()
    return stats, closed


def test_connections_for_which_there_is_no_descriptor_are_closed_and_counted(few_files: None) -> None:
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    free = (number for number in itertools.count() if number not in taken)
    stats, closed = asyncio.run(refused(None, next(itertools.islice(free, ROOM, None))))
    assert stats.accepted + stats.refused["descriptors"] == CLIENTS
    assert closed == stats.refused["descriptors"] > 0


def test_connections_beyond_the_most_are_closed_and_counted() -> None:
    stats, closed = asyncio.run(refused(10, None))
    assert (stats.accepted, stats.refused) == (10, {"connections": CLIENTS - 10})
    assert closed == CLIENTS - 10


def test_the_soft_limit_is_raised_or_the_hard_one_named() -> None:
    code = (
        "import resource\n"
        "from tracehaul.runtime.accepting import NoDescriptors, raise_nofile\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 1000))\n"
        "raise_nofile([('connections_max', 600), ('other files', 200)])\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "try:\n    raise_nofile([('connections_max', 1200)])\n"
        "except NoDescriptors as fault:\n    print(fault)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "(800, 1000)"
    assert "may open 1000 files" in second
    assert "1200 for connections_max" in second
