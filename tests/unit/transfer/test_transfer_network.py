"""Which transport is taken for the network, and what is said of it: NIXL or UCXX, never both, or plain TCP."""

import asyncio
import os
from collections.abc import Iterator

import msgspec
import pytest

from tracehaul.runtime.addresses import BadAddress, bound
from tracehaul.runtime.offload import InlineOffload
from tracehaul.transfer import memory as memory_module
from tracehaul.transfer import network, nixl, shm, ucxx
from tracehaul.transfer.base import Copy
from tracehaul.transfer.devices import addresses_of, interfaces_here, ucx_settings
from tracehaul.transfer.memory import FileMemory, allocate
from tracehaul.transfer.opening import Planes, open_planes, open_transport
from tracehaul.transfer.place import LOOPBACK, Place
from tracehaul.transfer.plane import choose
from tracehaul.wire.errors import TransferError

OFFLOAD = InlineOffload()


class Stand:
    """For a transport of UCX's."""

    pull = "request"

    def __init__(self, owner: str) -> None:
        self.seen = {key: value for key, value in os.environ.items() if key.startswith("UCX_")}


def failing(owner: str) -> Stand:
    raise TransferError("NIXL cannot start")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(os.environ)
    for key in ("UCX_TLS", "UCX_NET_DEVICES"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(nixl, "NixlTransfer", Stand)
    monkeypatch.setattr(ucxx, "UcxxTransfer", Stand)
    yield
    os.environ.clear()
    os.environ.update(before)


def machine(monkeypatch: pytest.MonkeyPatch, there: set[str], rdma: set[str]) -> None:
    def installed(*packages: str) -> bool:
        return not there.isdisjoint(packages)

    monkeypatch.setattr(network, "installed", installed)
    monkeypatch.setattr(network, "rdma_devices", lambda: frozenset(rdma))
    monkeypatch.setattr(
        network,
        "interfaces_here",
        lambda: {"lo": frozenset({"127.0.0.1"}), "eth0": frozenset({"10.0.0.1"}), "docker0": frozenset({"172.17.0.1"})},
    )


HOST = Place("127.0.0.1", "10.0.0.1")  # what is announced decides


@pytest.mark.parametrize(
    ("kind", "there", "rdma", "how"),
    [
        ("nixl", {"nixl_cu12", "ucxx"}, set(), "nixl on all but docker0,lo (no RDMA device may be used)"),
        ("nixl", {"ucxx"}, set(), "ucxx on all but docker0,lo (NIXL is not installed)"),
        ("ucxx", {"nixl", "ucxx"}, set(), "ucxx on all but docker0,lo"),
        ("auto", {"nixl_cu12"}, {"mlx5_0"}, "nixl on all but docker0,lo (no RDMA device may be used)"),
        ("auto", {"nixl_cu12"}, set(), "tcp 10.0.0.1:{} (no RDMA device may be used)"),
        ("auto", {"ucxx"}, {"mlx5_0"}, "tcp 10.0.0.1:{} (NIXL, for RDMA by mlx5_0, is not installed)"),
        ("tcp", set(), set(), "tcp 10.0.0.1:{}"),
        ("shm", set(), set(), "shm"),
    ],
)
def test_what_was_chosen_and_why(
    monkeypatch: pytest.MonkeyPatch, kind: str, there: set[str], rdma: set[str], how: str
) -> None:
    machine(monkeypatch, there, rdma)

    async def main() -> None:
        opened = open_transport(kind, "us#1", HOST, OFFLOAD)
        assert opened.how == how.format(getattr(opened.transfer, "port", ""))
        if not isinstance(opened.transfer, Stand):
            await opened.transfer.close()

    asyncio.run(main())


@pytest.mark.parametrize("asked", ["^mlx5_0", "eth0"])
def test_rdma_that_may_not_be_used_is_not(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    machine(monkeypatch, {"nixl"}, {"mlx5_0"})
    monkeypatch.setenv("UCX_NET_DEVICES", asked)

    async def main() -> None:
        opened = open_transport("auto", "us#1", HOST, OFFLOAD)
        assert opened.how.startswith("tcp ")
        await opened.transfer.close()

    asyncio.run(main())


def test_a_nixl_that_fails_is_replaced_by_nothing_of_ucx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its UCX is in the process by then."""
    machine(monkeypatch, {"nixl", "ucxx"}, {"mlx5_0"})
    monkeypatch.setattr(nixl, "NixlTransfer", failing)
    with pytest.raises(TransferError, match="cannot start"):
        open_transport("nixl", "us#1", HOST, OFFLOAD)

    async def main() -> None:
        opened = open_transport("auto", "us#1", HOST, OFFLOAD)
        assert opened.how.endswith("(NIXL cannot start)")
        assert opened.transfer.kind == "tcp"
        await opened.transfer.close()

    asyncio.run(main())


def test_neither_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, set(), set())
    with pytest.raises(TransferError, match="neither"):
        open_transport("nixl", "us#1", HOST, OFFLOAD)
    with pytest.raises(TransferError, match="no transport is called pigeon"):
        open_transport("pigeon", "us#1", HOST, OFFLOAD)


# --- UCX's devices

INTERFACES = {
    "lo": frozenset({"127.0.0.1", "::1"}),
    "eth0": frozenset({"10.0.0.1", "fd00::1"}),
    "docker0": frozenset({"172.17.0.1"}),
    "br-9f": frozenset({"172.18.0.1"}),
    "veth1": frozenset({"fe80::1"}),
}


@pytest.mark.parametrize(
    ("place", "environ", "known", "settings"),
    [
        (Place(), {}, "10.0.0.1", {"UCX_NET_DEVICES": "^br-9f,docker0,lo,veth1"}),
        (Place(), {}, "fd00::1", {"UCX_NET_DEVICES": "^br-9f,docker0,lo,veth1"}),
        (Place(), {}, "127.0.0.1", {}),
        (Place(), {}, "172.17.0.1", {}),
        (Place(), {}, "10.9.9.9", {}),
        (Place(), {"UCX_NET_DEVICES": "eth0"}, "10.0.0.1", {}),
        (Place(devices=("mlx5_0:1", "eth0")), {}, "10.0.0.1", {"UCX_NET_DEVICES": "mlx5_0:1,eth0"}),
        (Place(devices=("eth0",)), {"UCX_NET_DEVICES": "eth1"}, "10.0.0.1", {"UCX_NET_DEVICES": "eth0"}),
        (Place(devices=("eth0",), ucx_tls="tcp"), {}, "", {"UCX_NET_DEVICES": "eth0", "UCX_TLS": "tcp"}),
    ],
)
def test_ucx_is_given_what_peers_can_reach(
    place: Place, environ: dict[str, str], known: str, settings: dict[str, str]
) -> None:
    assert ucx_settings(place, environ, INTERFACES, frozenset({known})) == settings


def test_the_library_sees_the_devices_when_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, {"nixl"}, set())
    opened = open_transport("nixl", "us#1", Place(devices=("eth7",), ucx_tls="tcp"), OFFLOAD)
    assert isinstance(opened.transfer, Stand)
    assert opened.transfer.seen == {"UCX_NET_DEVICES": "eth7", "UCX_TLS": "tcp"}
    assert opened.how == "nixl on eth7 (no RDMA device may be used)"


def test_this_machines_interfaces_and_addresses_are_seen() -> None:
    assert "127.0.0.1" in interfaces_here()["lo"]
    assert addresses_of(LOOPBACK) == {"127.0.0.1"}
    assert "127.0.0.1" in addresses_of(Place("127.0.0.1", "localhost"))
    assert addresses_of(Place("::1", "nobody.invalid")) == {"::1"}


# --- several at once


async def opened(kinds: tuple[str, ...], owner: str, memory: FileMemory, place: Place = LOOPBACK) -> Planes:
    return await open_planes(kinds, owner, place, memory, OFFLOAD)


def test_a_pair_takes_the_nearest_and_hosts_apart_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        mine, theirs = allocate(4096, "mine"), allocate(4096, "theirs")
        us, near = await opened(("shm", "tcp"), "us#1", mine), await opened(("shm", "tcp"), "near#1", theirs)
        assert [plane.transfer.kind for plane in us.planes] == ["shm", "tcp"]
        assert us.how[0] == "shm"
        assert us.how[1].startswith("tcp 127.0.0.1:")
        descriptors = [plane.region.descriptor for plane in near.planes]
        assert choose(us.planes, reversed(descriptors))[0].transfer.kind == "shm"
        monkeypatch.setattr(shm, "host_identity", lambda: "another boot/pid:[7]")
        far = await opened(("shm", "tcp"), "far#1", theirs)
        offered = [plane.region.descriptor for plane in far.planes]
        for ours, descriptors in ((us, offered), (far, [plane.region.descriptor for plane in us.planes])):
            plane, remote = choose(ours.planes, descriptors)
            assert plane.transfer.kind == remote.kind == "tcp"
        theirs.buffer[:5] = b"hello"
        plane, remote = choose(us.planes, offered)
        await plane.transfer.read(remote, plane.region, [Copy(0, 0, 5)], timeout_s=5)
        assert bytes(mine.buffer[:5]) == b"hello"
        for each in (us, near, far):
            await each.close()
        mine.close()
        theirs.close()

    asyncio.run(main())


def test_a_host_that_only_looks_like_this_one_is_another() -> None:
    """A machine that was cloned while it ran has the same boot id; its files are not here."""

    async def main() -> None:
        memory = allocate(4096, "mine")
        us = await opened(("shm",), "us#1", memory)
        (plane,) = us.planes
        remote = plane.region.descriptor
        assert plane.transfer.reaches(remote)
        payload = msgspec.msgpack.decode(remote.payload, type=shm.ShmPayload)
        for change in ({"link": payload.link[:-1] + "x"}, {"fd": 9999}, {"pid": 1 << 22}, {"pid": -1}):
            other = msgspec.msgpack.encode(msgspec.structs.replace(payload, **change))  # type: ignore[arg-type]
            assert not plane.transfer.reaches(msgspec.structs.replace(remote, payload=other)), change
        await us.close()
        memory.close()

    asyncio.run(main())


def test_where_no_memory_file_can_be_made_the_network_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(memory_module.os, "memfd_create", refuse)

    async def main() -> None:
        memory = allocate(5000, "mine")
        memory.buffer[4999:] = b"x"
        us = await opened(("shm", "tcp"), "us#1", memory)
        assert [plane.transfer.kind for plane in us.planes] == ["tcp"]
        assert us.how[0] == "no shm: this memory has no file to share"
        await us.close()
        with pytest.raises(TransferError, match="no shm: this memory has no file"):
            await opened(("shm",), "us#1", memory)
        memory.close()

    asyncio.run(main())


def test_a_network_that_cannot_start_leaves_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, set(), set())

    async def main() -> None:
        memory = allocate(4096, "mine")
        us = await opened(("shm", "nixl"), "us#1", memory)
        assert [plane.transfer.kind for plane in us.planes] == ["shm"]
        assert us.how[1].startswith("no nixl: neither NIXL nor UCXX")
        await us.close()
        memory.close()

    asyncio.run(main())


def test_a_place_that_cannot_be_had_is_a_fault_and_no_way_less() -> None:
    """It was said in a config: a node without it would be out of others' reach in silence."""

    async def main() -> None:
        memory = allocate(4096, "mine")
        with pytest.raises(BadAddress):
            await opened(("shm", "tcp"), "us#1", memory, Place("0.0.0.0"))
        with bound("127.0.0.1", 0) as taken, pytest.raises(OSError, match="cannot listen"):
            await opened(("shm", "auto"), "us#1", memory, Place(port=taken.getsockname()[1]))
        memory.close()

    asyncio.run(main())


def test_what_is_installed_is_found_without_an_import() -> None:
    assert network.installed("no_such_package", "msgspec")
    assert not network.installed("no_such_package")
