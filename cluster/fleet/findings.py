"""What is wrong with hosts, each with what to do about it; pure: facts in, findings out."""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from cluster.config import ClusterConfig
from cluster.fleet.config import HostConfig
from cluster.fleet.facts import Facts, Seen
from cluster.memory import Need
from cluster.plan import NodeSpec
from tracehaul.transfer.devices import DEVICES, TRANSPORTS, rdma_in_use

SKEW_MAX_S = 2.0
NOFILE_MIN = 8192
PYTHONS = ((3, 11), (3, 13))
"""Versions that tracehaul runs on, from and to."""
GLIBC_MIN = (2, 31)
"""What the wheels are built for."""
RELEASE_BYTES = 6 << 30
"""An environment with torch."""

Subject = Literal[
    "ssh", "python", "system", "clock", "memory", "shm", "nofile", "disk", "address", "ports", "mtu", "gpu", "rdma",
    "model", "network", "version", "nodes",
]  # fmt: skip


class Add(Protocol):
    """Notes a finding."""

    def __call__(self, subject: Subject, fault: str, remedy: str, *, fatal: bool = True) -> None: ...


class Finding(msgspec.Struct, frozen=True):
    """One fault."""

    host: str
    subject: Subject
    fault: str
    remedy: str
    fatal: bool = True
    """Whether nothing may be started with it."""


def of_host(
    host: HostConfig, seen: Seen, nodes: Sequence[NodeSpec], needs: Sequence[Need], running: bool
) -> list[Finding]:
    """What one host's facts show.

    Args:
        host: as the config says.
        seen: what it said.
        nodes: that are to run there.
        needs: what they take of its memory.
        running: whether nodes of this cluster run there: then they have the ports, and the memory.
    """
    facts = seen.facts
    found: list[Finding] = []

    def add(subject: Subject, fault: str, remedy: str, *, fatal: bool = True) -> None:
        found.append(Finding(host.name, subject, fault, remedy, fatal))

    if abs(seen.skew_s) > SKEW_MAX_S + seen.asked_s:
        way = "ahead of" if seen.skew_s > 0 else "behind"
        add("clock", f"its clock is {abs(seen.skew_s):.0f} s {way} this one's", "run chrony or ntpd there", fatal=False)
    if not host.environment:
        _python(facts, host, add)
    if facts.home_fault:
        add("disk", f"{facts.home} cannot be written: {facts.home_fault}", "say another `home`, or mend the disk")
    elif not host.environment and facts.home_free_bytes < RELEASE_BYTES and not running:
        add("disk", f"{_gib(facts.home_free_bytes)} free in {facts.home}", f"make {_gib(RELEASE_BYTES)} free there")
    if facts.memfd_fault:
        add("shm", f"processes cannot share memory: {facts.memfd_fault}", "allow memfd_create there (seccomp?)")
    if facts.nofile_hard < NOFILE_MIN:
        add("nofile", f"at most {facts.nofile_hard} open files a process", f"raise `ulimit -Hn` to {NOFILE_MIN}")
    if facts.listen_fault:
        add("address", f"no socket can be bound to {nodes[0].listen if nodes else host.listen}: {facts.listen_fault}",
            "say the address of one of its interfaces, or `listen`")  # fmt: skip
    if not running:
        if facts.ports_taken:
            ports = ", ".join(map(str, facts.ports_taken))
            add("ports", f"taken by others: {ports}", "end what listens there, or say another `[network] ports`")
        needed = sum(need.nbytes for need in needs)
        if needed > facts.available_bytes:
            fault = f"its nodes need {_gib(needed)}, {_gib(facts.available_bytes)} are available"
            add("memory", fault, "; ".join(f"{_gib(need.nbytes)} for {need.what} ({need.option})" for need in needs))
    _gpus(host, facts, nodes, add)
    down = [device for device in host.ucx_devices if device in {port.name for port in facts.rdma if not port.active}]
    unknown = [device for device in host.ucx_devices if not _known(device, facts)]
    for device in down:
        add("rdma", f"{device} is not active", "see `ibstat` there: cable, switch, subnet manager")
    for device in unknown:
        add("rdma", f"there is no device {device}", "see `ucx_info -d` there, and say it in `ucx_devices`")
    return found


def of_transport(config: ClusterConfig, host: HostConfig, facts: Facts) -> list[Finding]:
    """Of a host's RDMA devices, what KV does not use and why; and what is there for trusted networks alone. ``config``:
    with its security decided."""
    active = {port.name for port in facts.rdma if port.active}
    environ = {TRANSPORTS: ",".join(host.ucx_tls) or "all", DEVICES: ",".join(host.ucx_devices) or "all"}
    allowed = {name for name in active if rdma_in_use(environ, frozenset({name.split(":")[0]}))}
    encrypted = config.security.data == "tls"
    by_ucx = config.transport in ("nixl", "ucxx") or (config.transport == "auto" and bool(allowed) and not encrypted)
    found: list[Finding] = []

    def add(subject: Subject, fault: str, remedy: str) -> None:
        found.append(Finding(host.name, subject, fault, remedy, fatal=False))

    unseen = sorted(allowed - {device.name for device in facts.ucx}) if facts.ucx else []
    if by_ucx and unseen:
        add("rdma", f"UCX does not find {', '.join(unseen)}", "see `ucx_info -d` there: was it built with verbs?")
    if unused := sorted(active - allowed if by_ucx else active):
        why = "`ucx_devices` or `ucx_tls`"
        if config.transport in ("tcp", "shm"):
            why = f'transport = "{config.transport}"'
        elif encrypted:
            why = 'data = "tls"'
        add("rdma", f"not used: {', '.join(unused)}, by {why}", "say otherwise in the file, if KV shall go that way")
    if by_ucx and config.security.control == "mtls":
        add("network", "KV moves by UCX, which neither proves nor encrypts",
            'keep others off that network, or say transport = "tcp"')  # fmt: skip
    return found


def _python(facts: Facts, host: HostConfig, add: Add) -> None:
    version = tuple(int(part) for part in facts.python.split(".")[:2]) if facts.python else ()
    if facts.python_lacks:
        add("python", f"{host.python}: {facts.python_lacks}", "install python3 with python3-venv, or say `python`")
    elif not PYTHONS[0] <= version <= PYTHONS[1]:
        wanted = " to ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        add("python", f"{host.python} is {facts.python}", f"tracehaul needs {wanted}: say another as `python`")
    glibc = tuple(int(part) for part in facts.glibc.split(".")[:2]) if facts.glibc else ()
    if glibc < GLIBC_MIN:
        add("system", f"its C library is {facts.glibc or 'not glibc'}", "wheels need glibc 2.31 or newer")


def _gpus(host: HostConfig, facts: Facts, nodes: Sequence[NodeSpec], add: Add) -> None:
    if host.gpus > len(facts.gpus):
        add("gpu", f"{len(facts.gpus)} GPUs are seen, gpus = {host.gpus}", "see `nvidia-smi` there: driver, cables")
    used = {gpu for spec in nodes for gpu in spec.gpus}
    shared = [gpu for gpu in sorted(used) if sum(gpu in spec.gpus for spec in nodes) > 1]
    if shared:
        add("gpu", f"several workers share GPU {', '.join(map(str, shared))}", "fewer workers, if they are too slow",
            fatal=False)  # fmt: skip


def _known(device: str, facts: Facts) -> bool:
    names = {port.name for port in facts.rdma} | {interface.name for interface in facts.interfaces}
    return device in names


def of_fleet(
    config: ClusterConfig, seen: Mapping[str, Seen], digests: Mapping[str, str], addresses: Mapping[str, str]
) -> list[Finding]:
    """What only shows when hosts are compared: models that differ, networks that do not fit, one host under two names.

    ``digests``: of each pool's model here, if it is here. ``addresses``: those that KV moves between, by host.
    """
    found: list[Finding] = []
    hosts = {host.name: host for host in config.hosts}
    boots: dict[str, str] = {}
    for name, (facts, *_) in seen.items():
        first = boots.setdefault(facts.boot_id, name)
        if first != name:
            found.append(
                Finding(name, "address", f"it is the same machine as {first}", "say each host once", fatal=False)
            )
        for pool, digest in facts.models.items():
            said = hosts[name].model
            path = said.get(pool, "") if isinstance(said, dict) else said
            wanted = digests.get(pool) or next((d for each in seen.values() if (d := each.facts.models.get(pool))), "")
            if path and not digest:
                found.append(Finding(name, "model", f"there is no {path}", "copy it there, or leave `model` out"))
            elif path and wanted and digest != wanted:
                fault = f"{path} has other contents than elsewhere"
                found.append(Finding(name, "model", fault, "copy one of them to all, or leave `model` out"))
    mtus = {name: mtu for name, each in seen.items() if (mtu := _mtu(addresses.get(name, ""), each.facts))}
    if len(set(mtus.values())) > 1:
        least = min(mtus, key=lambda name: mtus[name])
        fault = f"the MTU of its interface is {mtus[least]}, others have {max(mtus.values())}"
        found.append(
            Finding(least, "mtu", fault, "set the same MTU everywhere (`ip link set dev … mtu …`)", fatal=False)
        )
    return found


def _mtu(address: str, facts: Facts) -> int:
    return next((each.mtu for each in facts.interfaces if address in each.addresses), 0)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
