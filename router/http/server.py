"""The HTTP server inside a running event loop: no signal handlers, no logging of its own."""

import asyncio
import contextlib
import socket
import weakref
from collections.abc import Generator
from typing import cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from router.http.asgi import CHUNKS

CONNECTIONS_MAX = 8192
"""Open connections; calls on more are answered 503 by the server itself."""
BACKLOG = 1024
KEEP_ALIVE_S = 75
START_TIMEOUT_S = 10.0
CANCEL_TIMEOUT_S = 5.0


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals belong to the process that hosts us."""
        yield


class _Protocol(HttpToolsProtocol):
    """Offers each call's :class:`_Chunks`."""

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        cycle = cast("RequestResponseCycle | None", self.cycle)  # none where another protocol takes over
        if cycle is not None:
            cast(dict[str, object], cycle.scope)["extensions"] = {CHUNKS: _Chunks(cycle)}


class _Chunks:
    """Implements :class:`router.http.asgi.Chunks`, as uvicorn's own ``send`` does it."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = weakref.ref(cycle)  # whose scope leads here

    @property
    def writable(self) -> bool:
        cycle = self._cycle()
        if cycle is None or cycle.chunked_encoding is not True:
            return False
        return not (cycle.flow.write_paused or cycle.response_complete)

    def write(self, data: bytes) -> None:
        cycle = self._cycle()
        if cycle is not None and not cycle.disconnected:
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class ApiServer:
    """A listening HTTP server."""

    def __init__(self, server: uvicorn.Server, task: asyncio.Task[None], host: str, port: int) -> None:
        self._server = server
        self._task = task
        self.host = host
        self.port = port
        """The port actually bound."""

    async def wait(self) -> None:
        """Returns when the server has ended; raises what it failed with."""
        await asyncio.shield(self._task)

    async def close(self) -> None:
        """Accept no more calls, let running ones end for the grace time, then cancel them."""
        self._server.should_exit = True
        await asyncio.gather(self._task, return_exceptions=True)
        # The server has cancelled what was left, and does not wait for it.
        left = set(self._server.server_state.tasks)
        if left:
            await asyncio.wait(left, timeout=CANCEL_TIMEOUT_S)


async def serve(app: ASGIApp, host: str, port: int, *, grace_s: int = 5) -> ApiServer:
    """Start serving ``app``; port 0 takes any free one. ``grace_s``: for calls in progress when it is closed.

    Raises:
        OSError: the address cannot be bound; says which.
    """
    listener = await _bind(host, port)
    config = uvicorn.Config(
        app,
        loop="none",
        http=_Protocol,
        ws="none",
        lifespan="auto",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS_MAX,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=grace_s,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="http-server")
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not server.started and not task.done():  # noqa: ASYNC110 - uvicorn offers no event to wait for
                await asyncio.sleep(0.005)
    except TimeoutError:
        task.cancel()
        raise
    if task.done():
        task.result()
    return ApiServer(server, task, host, listener.getsockname()[1])


async def _bind(host: str, port: int) -> socket.socket:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind(address)
        # Listening now, not with the server's start, tells two servers on one port apart.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener
