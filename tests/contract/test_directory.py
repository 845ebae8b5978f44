"""Where routers are found: one suite for the plan's file and for a real etcd, and what befalls etcd."""

import asyncio
import contextlib
import shutil
import signal
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pytest

from cluster.config_file import load_config
from cluster.directory import etcd as etcd_module
from cluster.directory.base import Directory
from cluster.directory.config import DirectoryConfig
from cluster.directory.etcd import EtcdDirectory
from cluster.directory.file import FileDirectory
from cluster.launch import free_port
from cluster.rundir import ClusterFault
from cluster.security.ca import ensure_ca, issue
from cluster.security.laying import lay
from tests.etcd_server import Etcd
from tracehaul.runtime import clock
from tracehaul.runtime.credentials import CA_FILE, CERT_FILE, KEY_FILE

A, B = "10.0.0.1:7000", "10.0.0.2:7000"
SOON_S = 10.0
SEED = "10.0.0.9:7000"


@pytest.fixture(scope="module")
def server() -> Generator[Etcd, None, None]:
    if shutil.which("etcd") is None:
        pytest.skip("etcd is not installed: apt-get install etcd-server")
    with tempfile.TemporaryDirectory() as folder:
        made = Etcd(Path(folder, "data"))
        made.start()
        yield made
        made.kill()


class Site(Protocol):
    """A directory, and how routers come and go in it."""

    def open(self) -> Directory: ...
    async def put(self, name: str, address: str) -> None: ...
    async def take(self, name: str) -> None: ...
    async def end(self) -> None: ...


class FileSite:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "plan"
        self.named = {"seed": SEED}
        self._write()

    def _write(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(self.named))
        new.replace(self.path)

    def read(self) -> tuple[str, ...]:
        try:
            return tuple(msgspec.json.decode(self.path.read_bytes()).values())
        except (OSError, msgspec.DecodeError) as error:
            raise ClusterFault(f"no plan: {error}") from error

    def open(self) -> FileDirectory:
        return FileDirectory(self.path, self.read, every_s=0.05)

    async def put(self, name: str, address: str) -> None:
        self.named[name] = address
        self._write()

    async def take(self, name: str) -> None:
        del self.named[name]
        self._write()

    async def end(self) -> None:
        pass


class EtcdSite(FileSite):
    """Its routers register themselves."""

    def __init__(self, folder: Path, server: Etcd, name: str) -> None:
        super().__init__(folder)
        self.config = DirectoryConfig(etcd=(server.url,), prefix=f"/test/{name}", ttl_s=2)
        self.announcing: dict[str, asyncio.Task[Any]] = {}

    def open(self) -> EtcdDirectory:
        return EtcdDirectory(self.config, "ours", super().open(), look_s=1.0)

    async def put(self, name: str, address: str) -> None:
        self.announcing[name] = asyncio.create_task(self.open().announce(name, address))

    async def take(self, name: str) -> None:
        task = self.announcing.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def end(self) -> None:
        for name in list(self.announcing):
            await self.take(name)


@pytest.fixture(params=["file", "etcd"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> FileSite:
    if request.param == "file":
        return FileSite(tmp_path)
    return EtcdSite(tmp_path, request.getfixturevalue("server"), tmp_path.name)


@pytest.fixture
def in_etcd(server: Etcd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EtcdSite:
    monkeypatch.setattr(etcd_module, "ASK_S", 0.5)
    monkeypatch.setattr(etcd_module, "BACKOFF_MAX_S", 0.5)
    return EtcdSite(tmp_path, server, tmp_path.name)


class Follower:
    def __init__(self, directory: Directory) -> None:
        self.directory = directory
        self.told: list[tuple[str, ...]] = []

    async def until(self, *routers: str) -> None:
        async with asyncio.timeout(SOON_S):
            while not self.told or self.told[-1] != routers:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert self.directory.routers == routers

    async def faulty(self, *words: str) -> None:
        """Until it says that; no words: until all is well."""
        async with asyncio.timeout(SOON_S):
            while not all(word in self.directory.fault for word in words) or (not words and self.directory.fault):  # noqa: ASYNC110
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def following(site: Site) -> AsyncGenerator[Follower]:
    follower = Follower(site.open())
    task = asyncio.create_task(follower.directory.follow(follower.told.append))
    try:
        yield follower
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await site.end()


def play(site: Site, case: Callable[[Follower], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), following(site) as follower:
            await case(follower)

    asyncio.run(main())


# --- every directory ----------------------------------------------------------------------------------------


def test_routers_of_the_plan_are_known_at_once_and_others_as_they_come_and_go(site: FileSite) -> None:
    async def case(follower: Follower) -> None:
        assert follower.directory.routers == (SEED,)
        await follower.until(SEED)
        await site.put("router-a", A)
        await follower.until(A, SEED)
        await site.put("router-b", B)
        await follower.until(A, B, SEED)
        await site.take("router-a")
        await follower.until(B, SEED)
        assert follower.directory.fault == ""

    play(site, case)


def test_one_that_follows_later_finds_all(site: FileSite) -> None:
    async def case(follower: Follower) -> None:
        await site.put("router-a", A)
        await follower.until(A, SEED)
        async with asyncio.timeout(SOON_S):
            late = Follower(site.open())
            task = asyncio.create_task(late.directory.follow(late.told.append))
            await late.until(A, SEED)
            task.cancel()

    play(site, case)


def test_a_plan_that_cannot_be_read_takes_no_router_away(site: FileSite) -> None:
    async def case(follower: Follower) -> None:
        await site.put("router-a", A)
        await follower.until(A, SEED)
        site.path.write_text("{")
        await follower.faulty("no plan")
        site.path.unlink()
        await asyncio.sleep(0.3)
        assert follower.directory.routers == (A, SEED)
        site._write()
        await follower.faulty()
        assert follower.directory.routers == (A, SEED)

    play(site, case)


# --- etcd ---------------------------------------------------------------------------------------------------


def test_a_router_that_dies_is_gone_when_its_lease_ends(in_etcd: EtcdSite, server: Etcd) -> None:
    async def case(follower: Follower) -> None:
        await in_etcd.put("router-b", B)
        lease = server.ask("lease/grant", TTL="2")["ID"]
        key, value = in_etcd.open()._folder + "router-a", msgspec.json.encode({"address": A, "of a later version": 1})
        server.ask("kv/put", key=etcd_module._b64(key), value=etcd_module._b64(value.decode()), lease=lease)
        await follower.until(A, B, SEED)
        await follower.until(B, SEED)

    play(in_etcd, case)


def test_an_etcd_that_dies_and_comes_back_takes_no_router_away(in_etcd: EtcdSite, server: Etcd) -> None:
    async def case(follower: Follower) -> None:
        await in_etcd.put("router-a", A)
        await follower.until(A, SEED)
        told = len(follower.told)
        server.kill()
        await follower.faulty("etcd at", server.url)
        await asyncio.sleep(in_etcd.config.ttl_s + 1.0)
        assert follower.directory.routers == (A, SEED)
        await asyncio.to_thread(server.start)
        await follower.faulty()
        await in_etcd.put("router-b", B)
        await follower.until(A, B, SEED)
        assert all(A in routers for routers in follower.told[told:])

    play(in_etcd, case)


def test_an_etcd_that_stands_still_takes_no_router_away(in_etcd: EtcdSite, server: Etcd) -> None:
    async def case(follower: Follower) -> None:
        assert server.process is not None
        await in_etcd.put("router-a", A)
        await follower.until(A, SEED)
        server.process.send_signal(signal.SIGSTOP)
        await follower.faulty("etcd at", server.url)
        assert follower.directory.routers == (A, SEED)
        server.process.send_signal(signal.SIGCONT)
        await follower.faulty()
        await follower.until(A, SEED)

    play(in_etcd, case)


def test_an_etcd_that_was_emptied_takes_no_router_away_and_gets_them_back(in_etcd: EtcdSite, server: Etcd) -> None:
    async def case(follower: Follower) -> None:
        await in_etcd.put("router-a", A)
        await follower.until(A, SEED)
        told = len(follower.told)
        await asyncio.to_thread(server.restart_empty)
        await in_etcd.put("router-b", B)
        await follower.until(A, B, SEED)
        # A may register after B: then it is missing for a while, and nodes that it answers stay with it.
        assert all(len(routers) > 1 for routers in follower.told[told:])

    play(in_etcd, case)


def test_keys_that_were_deleted_come_back(in_etcd: EtcdSite, server: Etcd) -> None:
    async def case(follower: Follower) -> None:
        await in_etcd.put("router-a", A)
        await follower.until(A, SEED)
        server.ask("kv/deleterange", **in_etcd.open()._keys())
        await follower.faulty("names no router any more")
        assert follower.directory.routers == (A, SEED)
        await follower.faulty()

    play(in_etcd, case)


def test_the_next_member_is_asked_where_one_does_not_answer(in_etcd: EtcdSite, server: Etcd) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    in_etcd.config = msgspec.structs.replace(in_etcd.config, etcd=(nobody, server.url))

    async def case(follower: Follower) -> None:
        await in_etcd.put("router-a", A)
        await follower.until(A, SEED)
        await follower.faulty()

    play(in_etcd, case)


def test_what_is_no_etcd_is_said_and_takes_no_router_away(in_etcd: EtcdSite) -> None:
    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(100)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]")
            writer.close()

        liar = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{liar.sockets[0].getsockname()[1]}"
        in_etcd.config = msgspec.structs.replace(in_etcd.config, etcd=(url,))
        async with following(in_etcd) as follower:
            await follower.faulty("etcd at", url)
            assert follower.directory.routers == (SEED,)
        liar.close()

    asyncio.run(main())


def test_with_certificates_of_both_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("etcd") is None:
        pytest.skip("etcd is not installed: apt-get install etcd-server")
    monkeypatch.setattr(etcd_module, "BACKOFF_MAX_S", 0.5)
    secrets = {name: tmp_path / name for name in ("etcd", "node", "stranger")}
    for name, folder in secrets.items():
        authority = tmp_path / ("other" if name == "stranger" else "ours")
        ensure_ca(authority, "ours", now_s=clock.wall_s())
        folder.mkdir()
        lay(folder, issue(authority, name, ["127.0.0.1"], now_s=clock.wall_s()))
    server = Etcd(tmp_path / "data", secrets["etcd"])
    server.start()
    site = EtcdSite(tmp_path, server, "tls")

    def shown_by(name: str) -> DirectoryConfig:
        cert, key = str(secrets[name] / CERT_FILE), str(secrets[name] / KEY_FILE)
        return msgspec.structs.replace(site.config, ca=str(secrets["node"] / CA_FILE), cert=cert, key=key)

    async def case(follower: Follower) -> None:
        await site.put("router-a", A)
        await follower.until(A, SEED)
        site.config = shown_by("stranger")
        stranger = Follower(site.open())
        task = asyncio.create_task(stranger.directory.follow(stranger.told.append))
        await stranger.faulty("etcd at", server.url)
        assert stranger.directory.routers == (SEED,)
        task.cancel()

    site.config = shown_by("node")
    try:
        play(site, case)
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ('name = "ours"\n[directory]\netcd = ["10.0.0.1:2379"]', "line 2): etcd is not at '10.0.0.1:2379'"),
        ('[directory]\netcd = ["http://10.0.0.1:2379"]', "line 2): with etcd a cluster has a `name` of its own"),
        ('name = "ours"\n[directory]\nkey = "k.pem"', "cert and key belong together"),
        ('name = "ours"\n[directory]\nca = "ca.pem"', "ca is for https"),
        ('name = "ours"\n[directory]\netdc = []', "line 3): Object contains unknown field `etdc`"),
    ],
)
def test_what_makes_no_sense_is_refused(said: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(said)
    with pytest.raises(ClusterFault) as refusal:
        load_config(file, {})
    assert words in str(refusal.value)
