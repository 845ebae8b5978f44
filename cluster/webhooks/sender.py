"""Takes events to receivers over HTTP, and only where they may go.

A name is looked up for each attempt, and the connection goes to an address that was looked at, not to what the name
says a moment later. Nothing is followed, nothing of an answer is read but its head, and everything has one deadline.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpcore

from cluster.webhooks.config import WebhookConfig
from cluster.webhooks.secrets import NoSecret, read, signatures
from jobs.webhooks.deliveries import Delivered, Failed, Outcome
from jobs.webhooks.outbox import Receiver
from tracehaul import __version__
from tracehaul.runtime.clock import wall_s
from tracehaul.runtime.offload import ThreadOffload

SEND_S = 15.0
"""An attempt takes no longer."""
GONE = 410
WHY_CHARACTERS_MAX = 200
_UNICAST = ipaddress.ip_network("2000::/3")
"""What of IPv6 may be public."""
_TUNNELS = tuple(map(ipaddress.ip_network, ("2002::/16", "2001::/32")))
"""Of them, those that lead to addresses of IPv4."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Refused(Exception):
    """Nothing may go there; says why."""


def permitted(address: Address, networks: Iterable[Network], *, plain: bool) -> bool:
    """Whether events may go there. ``networks``: where they may go beside public addresses, and alone where they are
    ``plain``."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if any(address in network for network in networks):
        return True
    public = address.is_global and not address.is_multicast
    if address.version == 6:
        public = public and address in _UNICAST and not any(address in tunnel for tunnel in _TUNNELS)
    return public and not plain


class _Careful(httpcore.AsyncNetworkBackend):
    """Connects to what is permitted."""

    def __init__(self, networks: Iterable[Network], names: ThreadOffload, *, plain: bool) -> None:
        self._any: httpcore.AsyncNetworkBackend = cast(Any, httpcore.AnyIOBackend)()
        self._networks = tuple(networks)
        self._names = names
        self._plain = plain

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.AsyncNetworkStream:
        look = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in await self._names.run(look)]
        good = [each for each in found if permitted(each, self._networks, plain=self._plain)]
        if not good:
            shown = ", ".join(map(str, dict.fromkeys(found)))
            why = (
                "plain http goes only into `networks`" if self._plain else "not public: name its network in `networks`"
            )
            raise Refused(f"{host} is {shown}: {why}")
        for last, address in enumerate(good, start=1 - len(good)):
            try:
                return await self._any.connect_tcp(str(address), port, timeout, local_address, socket_options)
            except httpcore.ConnectError:
                if not last:
                    raise
        raise AssertionError("one of them was tried")

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Any = None
    ) -> httpcore.AsyncNetworkStream:
        raise Refused("events go to addresses only")

    async def sleep(self, seconds: float) -> None:
        await self._any.sleep(seconds)


class HttpSender:
    """Implements :class:`jobs.webhooks.outbox.Sender`. :meth:`close` it."""

    def __init__(self, webhooks: Iterable[WebhookConfig], folder: Path) -> None:
        """``folder``: of the secrets."""
        self._webhooks: Mapping[str, WebhookConfig] = {each.url: each for each in webhooks}
        self._folder = folder
        # What looks names up cannot be broken off: one for each receiver, that none is held up by another's.
        self._names = {url: ThreadOffload("webhook") for url in self._webhooks}
        self._tls: ssl.SSLContext | None = None

    async def send(self, receiver: Receiver, event: str, body: str) -> Outcome:
        try:
            async with asyncio.timeout(SEND_S):
                return await self._send(receiver, event, body)
        except TimeoutError:
            return Failed(f"no answer within {SEND_S:.0f} s")
        except (Refused, NoSecret) as error:
            return Failed(str(error))
        except UnicodeError as error:  # who looks names up says so of one that can be nobody's
            return Failed(f"its host is no name: {error}"[:WHY_CHARACTERS_MAX])
        except (
            httpcore.NetworkError,
            httpcore.ProtocolError,
            httpcore.TimeoutException,
            OSError,
            ssl.SSLError,
        ) as error:
            return Failed((str(error) or type(error).__name__)[:WHY_CHARACTERS_MAX])

    def close(self) -> None:
        """Look no names up any more."""
        for names in self._names.values():
            names.close()

    async def _send(self, receiver: Receiver, event: str, body: str) -> Outcome:
        webhook, names = self._webhooks[receiver.url], self._names[receiver.url]
        secrets = await names.run(partial(read, self._folder / webhook.secret))
        at_s = wall_s()
        headers = {
            "content-type": "application/json",
            "user-agent": f"tracehaul/{__version__}",
            "webhook-id": event,
            "webhook-timestamp": str(int(at_s)),
            "webhook-signature": signatures(secrets, event, int(at_s), body),
        }
        url = httpcore.URL(receiver.url)
        host = url.host.decode()
        headers["host"] = host if url.port is None else f"{host}:{url.port}"
        plain = url.scheme == b"http"
        networks = [ipaddress.ip_network(each) for each in webhook.networks]
        if self._tls is None and not plain:
            self._tls = await names.run(ssl.create_default_context)
        backend = _Careful(networks, names, plain=plain)
        async with (
            httpcore.AsyncConnectionPool(ssl_context=self._tls, network_backend=backend, http2=False) as pool,
            pool.stream("POST", url, headers=list(headers.items()), content=body.encode()) as answer,
        ):
            return _outcome(answer.status, dict(answer.headers))


def _outcome(status: int, headers: Mapping[bytes, bytes]) -> Outcome:
    if 200 <= status < 300:
        return Delivered()
    why = f"it answers {status}"
    if 300 <= status < 400:
        why += ", and is not followed elsewhere"
    after = next((value for name, value in headers.items() if name.lower() == b"retry-after"), b"")
    return Failed(why, float(after) if after.isdigit() and len(after) < 10 else 0.0, gone=status == GONE)
