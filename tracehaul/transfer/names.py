"""From what a peer announces to where a connection goes: names are looked up when they are needed, off the loop."""

import asyncio
import re
import socket
from typing import NamedTuple

from tracehaul.runtime.addresses import literal
from tracehaul.wire.errors import TransferLost

TRY_S = 1.0
"""How long one of several addresses of a name is tried."""
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?")


class Target(NamedTuple):
    """Where a socket connects to."""

    family: socket.AddressFamily
    place: tuple[str, int] | tuple[str, int, int, int]


def is_host(host: str) -> bool:
    """Whether it is an address or could be a name."""
    return literal(host) is not None or _NAME.fullmatch(host) is not None


def known(host: str, port: int) -> Target | None:
    """Of a literal address, at once; None: it is a name."""
    address = literal(host)
    if address is None:
        return None
    return Target(socket.AF_INET6 if address.version == 6 else socket.AF_INET, (host, port))


class Names:
    """Looks names up; callers who want the same one share the work."""

    def __init__(self) -> None:
        self._asked: dict[tuple[str, int], asyncio.Task[Target]] = {}

    async def target(self, host: str, port: int, timeout_s: float) -> Target:
        """An address of that name; if it has several, the first that takes a connection.

        Raises:
            TransferLost: it has none, or none is found within ``timeout_s``.
        """
        task = self._asked.get((host, port))
        if task is None:
            task = self._asked[host, port] = asyncio.get_running_loop().create_task(_look_up(host, port))
            task.add_done_callback(lambda task: self._over((host, port), task))
        done, _ = await asyncio.wait([task], timeout=timeout_s)
        if not done:
            raise TransferLost(f"no address of {host} within {timeout_s:g} s")
        if task.cancelled():
            raise TransferLost("this side closed its transport")
        return task.result()

    def _over(self, key: tuple[str, int], task: asyncio.Task[Target]) -> None:
        self._asked.pop(key, None)
        if not task.cancelled():
            task.exception()  # seen: perhaps nobody waits any more

    async def aclose(self) -> None:
        """Who waits gets TransferLost."""
        tasks = list(self._asked.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _look_up(host: str, port: int) -> Target:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        targets = [Target(socket.AddressFamily(family), place) for family, _, _, _, place in found]  # pyright: ignore[reportArgumentType]
        for target in targets[:-1]:
            if await _takes(target):
                return target
    except (OSError, UnicodeError) as error:
        raise TransferLost(f"no address of {host}: {error}") from error
    return targets[-1]


async def _takes(target: Target) -> bool:
    """Whether somebody answers there."""
    with socket.socket(target.family, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            async with asyncio.timeout(TRY_S):
                await asyncio.get_running_loop().sock_connect(sock, target.place)
        except OSError:  # TimeoutError is one
            return False
        return True
