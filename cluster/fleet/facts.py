"""What is known of a host before a start: asked by :mod:`cluster.fleet.probe`, which runs there."""

import shlex
from pathlib import Path
from typing import NamedTuple

import msgspec

from cluster.fleet import probe
from cluster.fleet.connection import Connection, HostFault
from cluster.plan import NodeSpec
from tracehaul.runtime import clock

LOOK_S = 600.0
"""A model of hundreds of gigabytes is read once."""


class Asked(msgspec.Struct, frozen=True):
    """What a host is asked."""

    home: str
    python: str
    listen: str
    ports: tuple[int, ...]
    models: dict[str, str]
    """Paths there, by pool."""


class Interface(msgspec.Struct, frozen=True):
    """One of a network."""

    name: str
    mtu: int
    up: bool
    mbit_s: int
    """0: it does not say."""
    addresses: tuple[str, ...]


class RdmaPort(msgspec.Struct, frozen=True):
    """One of an RDMA device, as UCX names it."""

    name: str
    active: bool


class UcxDevice(msgspec.Struct, frozen=True):
    """One that UCX finds."""

    name: str
    transports: tuple[str, ...]


class Gpu(msgspec.Struct, frozen=True):
    """One of a host."""

    name: str
    bytes: int
    free_bytes: int
    driver: str


class Facts(msgspec.Struct, frozen=True):
    """What a host says of itself. A fault is a few words; empty: none."""

    boot_id: str
    machine: str
    """``x86_64`` or ``aarch64``."""
    glibc: str
    python: str
    """Version of what makes environments; empty: there is none."""
    python_lacks: str
    home: str
    """Whole path."""
    home_fault: str
    home_free_bytes: int
    memfd_fault: str
    available_bytes: int
    nofile_hard: int
    interfaces: tuple[Interface, ...]
    rdma: tuple[RdmaPort, ...]
    gpus: tuple[Gpu, ...]
    listen_fault: str
    ports_taken: tuple[int, ...]
    models: dict[str, str]
    """Digests by pool; empty: the path is not there."""
    wall_s: float
    ucx: tuple[UcxDevice, ...] = ()
    """Empty: there is no ``ucx_info`` to be asked."""


class Seen(NamedTuple):
    """Facts with what only the asking side knows."""

    facts: Facts
    skew_s: float
    """How far the host's clock is ahead of this one's, to within half of ``asked_s``."""
    asked_s: float
    """How long the question took."""


def ports_of(nodes: tuple[NodeSpec, ...]) -> tuple[int, ...]:
    """All that these nodes listen on, but the API's."""
    ports = [port for spec in nodes for port in (spec.control_port, spec.data_port, spec.metrics_port)]
    return tuple(sorted(port for port in ports if port))


async def look(way: Connection, asked: Asked) -> Seen:
    """Ask a host.

    Raises:
        HostFault: it cannot be reached, or has no Python.
    """
    command = [asked.python, "-", msgspec.json.encode(asked).decode()]
    began_s = clock.wall_ns() / 1e9
    done = await way.run(command, Path(probe.__file__), LOOK_S)
    ended_s = clock.wall_ns() / 1e9
    if done.code != 0:
        hint = "install python3 there, or say another as `python`" if done.code == 127 else done.last_line
        raise HostFault(f"cannot look at it with {shlex.quote(asked.python)}: {hint}")
    try:
        facts = msgspec.json.decode(done.out, type=Facts)
    except msgspec.DecodeError as error:
        raise HostFault(f"its {asked.python} answers nonsense (does its shell print at login?): {error}") from error
    return Seen(facts, facts.wall_s - ended_s, ended_s - began_s)
