"""Which of a host's devices UCX is given, and so whether there is RDMA among them.

UCX takes every device that it finds. Two hosts that both have a ``docker0`` of the same address then try to meet there,
and one finds itself: what belongs to containers and virtual machines is left out where another interface has the
address that peers are told.
"""

import contextlib
import ctypes
import fcntl
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from tracehaul.runtime.addresses import literal
from tracehaul.transfer.place import Place

DEVICES, TRANSPORTS = "UCX_NET_DEVICES", "UCX_TLS"
RDMA_TLS = frozenset({"rc", "rc_v", "rc_x", "rc_verbs", "rc_mlx5", "dc", "dc_x", "dc_mlx5", "ib", "gga_mlx5"})

_INWARD = ("docker", "br-", "virbr", "veth", "cni", "flannel", "cali")
_SIOCGIFCONF = 0x8912
_IFCONF = struct.Struct("iP")
_IFREQ = struct.Struct("16s4x4s16x")
_IFREQS_MAX = 512


def ucx_settings(
    place: Place, environ: Mapping[str, str], interfaces: Mapping[str, frozenset[str]], addresses: frozenset[str]
) -> dict[str, str]:
    """Variables of UCX to be set before it is loaded, beside those in ``environ``, which an operator may have set.

    Args:
        place: what the config says.
        environ: of this process.
        interfaces: those of this host, with their addresses.
        addresses: of this process, as peers know it.
    """
    settings: dict[str, str] = {}
    if place.ucx_tls:
        settings[TRANSPORTS] = place.ucx_tls
    if place.devices:
        settings[DEVICES] = ",".join(place.devices)
    elif DEVICES not in environ:
        inward = [name for name in sorted(interfaces) if _is_inward(name)]
        if inward and any(held & addresses for name, held in interfaces.items() if name not in inward):
            settings[DEVICES] = "^" + ",".join(inward)
    return settings


def rdma_in_use(environ: Mapping[str, str], devices: frozenset[str]) -> frozenset[str]:
    """Those of the machine's RDMA ``devices`` that UCX may use by its variables in ``environ``.

    Both variables are lists of what may be used, or, after a ``^``, of what may not.
    """
    if not _allowed(environ.get(TRANSPORTS, "all"), RDMA_TLS):
        return frozenset()
    nets = environ.get(DEVICES, "all")
    # A device is named with or without its port.
    return _allowed(",".join(net.split(":")[0] for net in nets.split(",")), devices)


def rdma_devices(folder: Path = Path("/sys/class/infiniband")) -> frozenset[str]:
    """Names of this machine's RDMA devices that have an active port: UCX offers no others."""
    ports = folder.glob("*/ports/*/state") if folder.is_dir() else ()
    return frozenset(port.parts[-4] for port in ports if "ACTIVE" in port.read_text())


def interfaces_here() -> dict[str, frozenset[str]]:
    """This host's network interfaces with their addresses; without those that have none, or cannot be seen."""
    held: dict[str, set[str]] = {}
    with contextlib.suppress(OSError):
        for name, address in _ipv4_here():
            held.setdefault(name, set()).add(address)
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            packed, *_, name = line.split()
            held.setdefault(name, set()).add(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(packed)))
    return {name: frozenset(addresses) for name, addresses in held.items()}


def addresses_of(place: Place) -> frozenset[str]:
    """Those that peers know this process by. Blocks while a name is looked up; none if that fails."""
    addresses: set[str] = set()
    for host in (place.announced, place.listen):
        known = literal(host)
        if known is not None:
            addresses.add(str(known))
            continue
        with contextlib.suppress(OSError, UnicodeError):
            addresses |= {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    return frozenset(addresses)


def _ipv4_here() -> Iterator[tuple[str, str]]:
    room = bytearray(_IFREQS_MAX * _IFREQ.size)
    ask = _IFCONF.pack(len(room), ctypes.addressof(ctypes.c_char.from_buffer(room)))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        used, _ = _IFCONF.unpack(fcntl.ioctl(sock, _SIOCGIFCONF, ask))
    for name, packed in _IFREQ.iter_unpack(room[:used]):
        yield name.split(b"\0")[0].decode(errors="replace").split(":")[0], socket.inet_ntoa(packed)


def _is_inward(name: str) -> bool:
    return name == "lo" or name.startswith(_INWARD)


def _allowed(listed: str, offered: frozenset[str]) -> frozenset[str]:
    """What of ``offered`` a list of UCX's allows."""
    names = frozenset(listed.removeprefix("^").split(","))
    if listed.startswith("^"):
        return offered - names
    return offered if "all" in names else offered & names
