"""The directory in etcd (v3, by its JSON gateway): each router has a key under a lease that it renews.

Keys are ``PREFIX/CLUSTER/routers/NAME``. Nodes look, wait until something changes, and look again: what a watch says is
never taken in, so nothing of it can be missed or come twice.
"""

import asyncio
import random
import ssl
from base64 import b64decode, b64encode
from typing import Any, NoReturn, TypeVar

import httpx
import msgspec

from cluster.directory.base import Told
from cluster.directory.config import DirectoryConfig
from cluster.directory.file import FileDirectory
from tracehaul.runtime.log import Log, Seldom

T = TypeVar("T")

log = Log(__name__)
seldom = Seldom(log)

ASK_S = 3.0
"""A member of etcd that does not answer in this time is frozen, cut off or far too busy: the next one is asked."""
LOOK_S = 30.0
"""As often nodes look although nothing is said to have changed: who waits does not notice that etcd stands still."""
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.5, 8.0
SETTLE_S = 0.1
"""After a change, for those that come with it."""
ROUTERS_MAX = 256


class _Entry(msgspec.Struct, frozen=True):
    """What a router's key holds."""

    address: str


class _Header(msgspec.Struct, frozen=True):
    revision: int


class _KeyValue(msgspec.Struct, frozen=True):
    key: str
    """Like the value in base64."""
    value: str = ""
    lease: int = 0


class _Range(msgspec.Struct, frozen=True):
    header: _Header
    kvs: tuple[_KeyValue, ...] = ()


class _Granted(msgspec.Struct, frozen=True):
    id: int = msgspec.field(name="ID")


class _Alive(msgspec.Struct, frozen=True):
    ttl: int = msgspec.field(name="TTL", default=0)
    """0: the lease is forgotten."""


class _Renewed(msgspec.Struct, frozen=True):
    result: _Alive = _Alive()


class _Happened(msgspec.Struct, frozen=True):
    events: tuple[msgspec.Raw, ...] = ()
    canceled: bool = False


class _Watched(msgspec.Struct, frozen=True):
    result: _Happened


class _Done(msgspec.Struct, frozen=True):
    """Of what tells nothing more."""


class EtcdDirectory:
    """Implements :class:`cluster.directory.base.Directory`; beside what it finds are the routers of the plan."""

    def __init__(self, config: DirectoryConfig, cluster: str, plan: FileDirectory, look_s: float = LOOK_S) -> None:
        """Raises:
        OSError: the files for TLS cannot be read; ssl.SSLError is one.
        """
        self._plan = plan
        self._config = config
        self._look_s = look_s
        self._folder = f"{config.prefix.rstrip('/')}/{cluster}/routers/"
        self._verify = _tls(config)
        self._found: dict[str, str] = {}
        """By name."""
        self._at = 0
        """Which member of etcd is asked."""
        self._fault = ""

    @property
    def routers(self) -> tuple[str, ...]:
        return tuple(sorted({*self._plan.routers, *self._found.values()}))

    @property
    def fault(self) -> str:
        return self._fault or self._plan.fault

    async def follow(self, told: Told) -> NoReturn:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._plan.follow(lambda _: told(self.routers)))
            await self._follow(told)
        raise AssertionError("neither ends")

    async def announce(self, name: str, address: str) -> NoReturn:
        backoff_s, lease = BACKOFF_MIN_S, 0
        async with self._client() as client:
            try:
                while True:
                    try:
                        lease = await self._renewed(client, name, address, lease)
                    except _FAULTS as fault:
                        self._failed(fault)
                        await asyncio.sleep(_some(backoff_s))
                        backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
                    else:
                        self._well()
                        backoff_s = BACKOFF_MIN_S
                        await asyncio.sleep(self._config.ttl_s / 3)
            finally:
                if lease:
                    await self._revoke(client, lease)

    # --- a node ------------------------------------------------------------------------------------------

    async def _follow(self, told: Told) -> NoReturn:
        backoff_s = BACKOFF_MIN_S
        async with self._client() as client:
            while True:
                try:
                    revision = await self._look(client, told)
                    backoff_s = BACKOFF_MIN_S
                    await self._wait(client, revision)
                except _FAULTS as fault:
                    self._failed(fault)
                    await asyncio.sleep(_some(backoff_s))
                    backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    async def _look(self, client: httpx.AsyncClient, told: Told) -> int:
        """Take in what is there now; its revision."""
        answer = await self._ask(client, "kv/range", {**self._keys(), "limit": ROUTERS_MAX}, _Range)
        found: dict[str, str] = {}
        for each in answer.kvs:
            name = b64decode(each.key).decode().removeprefix(self._folder)
            try:
                found[name] = msgspec.json.decode(b64decode(each.value), type=_Entry).address
            except msgspec.DecodeError:
                seldom.warning("an entry of the directory is no router's", about=name, name=name)
        if found or not self._found:
            self._well()
            changed, self._found = found != self._found, found
            if changed:
                log.info("routers of the directory", routers=" ".join(self.routers))
                told(self.routers)
        else:  # it was emptied, or restarted without its disk: who lives registers again
            self._fault = "etcd names no router any more"
            seldom.warning("etcd names no router any more: they are those that it named")
        return answer.header.revision

    async def _wait(self, client: httpx.AsyncClient, revision: int) -> None:
        """Until something may have changed since then."""
        watch = {"create_request": {**self._keys(), "start_revision": revision + 1}}
        try:
            async with asyncio.timeout(_some(self._look_s)):
                async with client.stream("POST", self._url("watch"), json=watch, timeout=_PATIENT) as answer:
                    answer.raise_for_status()
                    async for line in answer.aiter_lines():
                        told = msgspec.json.decode(line, type=_Watched, strict=False).result
                        if told.events or told.canceled:
                            break
                    else:
                        raise ConnectionResetError("the watch has ended")
                await asyncio.sleep(SETTLE_S)
        except TimeoutError:
            pass

    def _keys(self) -> dict[str, str]:
        return {"key": _b64(self._folder), "range_end": _b64(self._folder[:-1] + "0")}  # what follows a slash

    # --- a router ----------------------------------------------------------------------------------------

    async def _renewed(self, client: httpx.AsyncClient, name: str, address: str, lease: int) -> int:
        """The lease that the router's entry has now: a new one, where the old one is forgotten."""
        key, value = _b64(self._folder + name), _b64(msgspec.json.encode(_Entry(address)).decode())
        if lease:
            alive = await self._ask(client, "lease/keepalive", {"ID": str(lease)}, _Renewed)
            if alive.result.ttl > 0:
                kept = await self._ask(client, "kv/range", {"key": key}, _Range)
                if [(each.lease, each.value) for each in kept.kvs] == [(lease, value)]:
                    return lease
            log.warning("the directory has lost this router: it registers again", name=name)
        granted = await self._ask(client, "lease/grant", {"TTL": str(self._config.ttl_s)}, _Granted)
        await self._ask(client, "kv/put", {"key": key, "value": value, "lease": str(granted.id)}, _Done)
        log.info("registered", name=name, address=address)
        return granted.id

    async def _revoke(self, client: httpx.AsyncClient, lease: int) -> None:
        try:
            async with asyncio.timeout(1.0):
                await self._ask(client, "lease/revoke", {"ID": str(lease)}, _Done)
        except (*_FAULTS, TimeoutError):
            pass  # it ends by itself

    # --- etcd --------------------------------------------------------------------------------------------

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(verify=self._verify, timeout=ASK_S, trust_env=False)

    def _url(self, what: str) -> str:
        return f"{self._config.etcd[self._at % len(self._config.etcd)].rstrip('/')}/v3/{what}"

    async def _ask(self, client: httpx.AsyncClient, what: str, body: dict[str, Any], kind: type[T]) -> T:
        answer = await client.post(self._url(what), json=body)
        answer.raise_for_status()
        return msgspec.json.decode(answer.content, type=kind, strict=False)  # its integers are strings

    def _failed(self, fault: Exception) -> None:
        endpoint = self._config.etcd[self._at % len(self._config.etcd)]
        self._at += 1
        self._fault = f"etcd at {endpoint}: {type(fault).__name__} {fault}".strip()
        seldom.warning("etcd cannot be asked: routers are those that are known", about=endpoint, reason=self._fault)

    def _well(self) -> None:
        if self._fault:
            log.info("etcd answers again")
        self._fault = ""


_FAULTS = (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError, ValueError, OSError)
"""What comes of an etcd that is dead, frozen, or something else; httpx leaves some errors of TLS as they are."""
_PATIENT = httpx.Timeout(ASK_S, read=None)


def _tls(config: DirectoryConfig) -> ssl.SSLContext | bool:
    if not any(endpoint.startswith("https:") for endpoint in config.etcd):
        return False
    context = ssl.create_default_context(cafile=config.ca or None)
    if config.cert:
        context.load_cert_chain(config.cert, config.key)
    return context


def _b64(text: str) -> str:
    return b64encode(text.encode()).decode()


def _some(seconds: float) -> float:
    """About so many: nodes that have lost etcd at once do not all come back at once."""
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311 - spreads load
