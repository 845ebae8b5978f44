"""A stock server over HTTP: the one place that knows how. Every wait for it ends."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

import httpx
import msgspec

from engines.adapter.dialect import Request, failure
from tracehaul.wire.errors import ClusterError, PeerLost, ProtocolError, TimedOut

CONNECT_TIMEOUT_S = 2.0
SEND_TIMEOUT_S = 10.0
EVENT_BYTES_MAX = 256 * 2**20
"""A whole prompt's scores are one event."""
ERROR_BYTES_MAX = 2**16
_DONE = b"[DONE]"


class _Error(msgspec.Struct):
    message: str


class _Failed(msgspec.Struct):
    error: _Error


_errors = msgspec.json.Decoder(_Failed)


class StockServer:
    """Whoever answers at ``url``. It may be another life of it from one request to the next."""

    def __init__(self, url: str) -> None:
        timeout = httpx.Timeout(connect=CONNECT_TIMEOUT_S, write=SEND_TIMEOUT_S, read=None, pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self.url = url.rstrip("/")
        self._http = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False)

    async def get(self, path: str, timeout_s: float) -> bytes:
        """The body of an answer with status 200.

        Raises:
            PeerLost, TimedOut: nobody answers; ClusterError: with another status.
        """
        return await self._within(self._http.build_request("GET", self.url + path), timeout_s)

    async def post(self, request: Request, timeout_s: float) -> bytes:
        """As :meth:`get`."""
        return await self._within(self._built(request), timeout_s)

    async def events(self, request: Request) -> AsyncGenerator[bytes, None]:
        """The data of each event of the answer, or its one body. Closing the generator closes the connection.

        Raises:
            PeerLost: the connection broke, before the answer's end too; ClusterError: the server refuses, or failed.
        """
        try:
            async with aclosing(self._events(request)) as events:
                async for data in events:
                    yield data
        except httpx.TimeoutException as error:
            raise TimedOut(f"{self.url} takes no request") from error
        except httpx.HTTPError as error:
            raise self._lost(error) from error

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    def _built(self, request: Request) -> httpx.Request:
        headers = {"content-type": "application/json"}
        return self._http.build_request("POST", self.url + request.path, content=request.body, headers=headers)

    def _lost(self, error: Exception) -> ClusterError:
        return PeerLost(f"{self.url} is lost: {error or type(error).__name__}")

    async def _within(self, request: httpx.Request, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._http.send(request)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise TimedOut(f"{self.url} does not answer") from error
        except httpx.HTTPError as error:
            raise self._lost(error) from error
        if response.status_code != 200:
            raise failure(response.status_code, _message(response.content[:ERROR_BYTES_MAX]))
        return response.content

    async def _events(self, request: Request) -> AsyncGenerator[bytes, None]:
        response = await self._http.send(self._built(request), stream=True)
        try:
            if response.status_code != 200:
                raise failure(response.status_code, await _beginning(response))
            if not request.streams:
                yield await response.aread()
                return
            async with aclosing(_lines(response)) as lines:
                async for line in lines:
                    if not line.startswith(b"data:"):
                        continue  # a comment, to keep the connection open
                    data = line[5:].strip()
                    if data == _DONE:
                        return
                    yield data
            raise PeerLost(f"{self.url} is lost: its answer has no end")
        finally:
            await response.aclose()


async def _beginning(response: httpx.Response) -> str:
    """As much of an error's body as anybody reads: its message, where it is one in JSON."""
    body = b""
    async for part in response.aiter_bytes():
        body += part
        if len(body) > ERROR_BYTES_MAX:
            break
    return _message(body)


def _message(body: bytes) -> str:
    """What an error's body says: its message, where it is one in JSON."""
    with suppress(msgspec.MsgspecError):
        return _errors.decode(body).error.message
    return body.decode(errors="replace")


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Ended by a line feed, as JSON's text may hold what else ends lines of text."""
    rest: list[bytes] = []  # joined once: a long line comes in many parts
    nbytes = 0
    async for part in response.aiter_bytes():
        first, *others = part.split(b"\n")
        rest.append(first)
        nbytes += len(first)
        for line in others:
            yield b"".join(rest)
            rest, nbytes = [line], len(line)
        if nbytes > EVENT_BYTES_MAX:
            raise ProtocolError(f"the engine's server answered with an event of more than {EVENT_BYTES_MAX} bytes")
