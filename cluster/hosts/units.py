"""systemd units for a host's nodes. Pure."""

from collections.abc import Mapping, Sequence

import msgspec

from cluster.hosts.orders import Order, environment
from cluster.hosts.restarts import RestartPolicy
from cluster.plan import NodeSpec
from cluster.rundir import FENCED_EXIT

TARGET = "tracehaul.target"
STEPS_SINCE = 254
"""The first systemd that makes the delay between two starts grow."""
NOFILE = 1 << 20
STOP_GRACE_S = 5.0
"""Beside a node's drain."""
HOMES = ("/home", "/root", "/run/user")
TEMPORARY = ("/tmp", "/var/tmp")  # noqa: S108 - names of folders, to keep what is in them in sight
OWNER_LINE = "# Of the run directory "


class Site(msgspec.Struct, frozen=True):
    """The host that the units are for."""

    run_path: str
    release: str
    commands: Mapping[str, Sequence[str]]
    """What runs each node, by name."""
    version: int
    """systemd's."""
    of_user: bool = False
    """Units of a user's manager, which can neither choose a user nor hide folders."""
    user: str = ""
    """Who the nodes run as; empty: as the manager."""
    environment_file: str = ""
    writable: tuple[str, ...] = ()
    """Folders that nodes write beside the run directory; they may be missing."""
    read: tuple[str, ...] = ()
    """Files and folders that nodes must be able to read."""


def unit_name(node: str) -> str:
    """Of a node's service."""
    return f"tracehaul-{node}.service"


def unit_files(order: Order, site: Site) -> dict[str, str]:
    """Text of each unit by its file's name: a service per node, and a target of all."""
    services = {unit_name(spec.name): _service(order, spec, site) for spec in order.nodes}
    return services | {TARGET: _target(services, site)}


def owner(target: str) -> str:
    """The run directory that a target's text is of; empty if it does not say."""
    return next((line.removeprefix(OWNER_LINE) for line in target.splitlines() if line.startswith(OWNER_LINE)), "")


def services_of(target: str) -> list[str]:
    """Those that a target's text names."""
    return [name for line in target.splitlines() if line.startswith("Wants=") for name in line[6:].split()]


def _target(services: Mapping[str, str], site: Site) -> str:
    wanted_by = "default.target" if site.of_user else "multi-user.target"
    return _text(
        f"{OWNER_LINE}{site.run_path}",
        "[Unit]",
        "Description=tracehaul's nodes on this host",
        *(f"Wants={name}" for name in services),
        "",
        "[Install]",
        f"WantedBy={wanted_by}",
    )


def _service(order: Order, spec: NodeSpec, site: Site) -> str:
    policy, drain_s = order.restarts, order.plan.config.drain_timeout_s
    return _text(
        "[Unit]",
        f"Description=tracehaul {spec.role} {spec.name}",
        f"PartOf={TARGET}",
        *([] if site.of_user else ["Wants=network-online.target", "After=network-online.target time-sync.target"]),
        # systemd stops in the reverse of this order: those that let work in first. Nobody waits for another to serve.
        *(f"After={unit_name(other.name)}" for other in order.nodes if _stops_later(other, spec)),
        f"StartLimitIntervalSec={policy.window_s:g}",
        f"StartLimitBurst={policy.deaths_max + 1}",
        "",
        "[Service]",
        "Type=exec",
        *([f"User={site.user}"] if site.user and not site.of_user else []),
        f"WorkingDirectory={_plain(site.run_path)}",
        *(f"Environment={_word(f'{key}={value}')}" for key, value in environment(order, spec, site.release).items()),
        *([f"EnvironmentFile=-{_plain(site.environment_file)}"] if site.environment_file else []),
        f"ExecStart={' '.join(map(_argument, site.commands[spec.name]))}",
        # What a dead node said of itself is not true of the next.
        f"ExecStopPost=-/bin/rm -f {_argument(f'{site.run_path}/state/{spec.name}.json')}",
        f"Restart={'always' if policy.again else 'no'}",
        *_delays(policy, site.version),
        f"RestartPreventExitStatus={FENCED_EXIT}",
        "KillMode=mixed",
        f"TimeoutStopSec={drain_s + STOP_GRACE_S:g}",
        f"LimitNOFILE={NOFILE}",
        "LimitMEMLOCK=infinity",
        "TasksMax=infinity",
        *([f"MemoryMax={memory}"] if (memory := _memory_bytes(order, spec)) else []),
        "StandardOutput=journal",
        "StandardError=journal",
        f"SyslogIdentifier=tracehaul-{spec.name}",
        *_hardening(site),
    )


def _stops_later(other: NodeSpec, spec: NodeSpec) -> bool:
    order = {"router": 0, "prefill": 1, "decode": 1, "store": 2}
    return order[other.role] > order[spec.role]


def _delays(policy: RestartPolicy, version: int) -> list[str]:
    delays = [f"RestartSec={policy.delay_s:g}"]
    if version >= STEPS_SINCE:
        delays += ["RestartSteps=5", f"RestartMaxDelaySec={policy.delay_max_s:g}"]
    return delays


def _memory_bytes(order: Order, spec: NodeSpec) -> int:
    """What a store can need: its arena, an index of the tiers, and a program. 0: nobody knows, as of a worker."""
    arena = order.plan.store.arena_bytes
    return arena + arena // 8 + (2 << 30) if spec.role == "store" else 0


def _hardening(site: Site) -> list[str]:
    """No ``MemoryDenyWriteExecute``: kernels are compiled at run time. No private devices, network or IPC: GPUs, RDMA
    devices and memory that nodes share are what they are for."""
    lines = [
        "NoNewPrivileges=yes",
        "RestrictSUIDSGID=yes",
        "RestrictRealtime=yes",
        "LockPersonality=yes",
        "SystemCallArchitectures=native",
        "UMask=0077",
    ]
    if site.of_user:
        return lines
    writable = [site.run_path, *(f"-{path}" for path in site.writable)]
    paths = (site.run_path, *site.writable, *site.read)
    return lines + [
        "ProtectSystem=strict",
        f"ProtectHome={'read-only' if _any_within(paths, HOMES) else 'yes'}",
        f"PrivateTmp={'no' if _any_within(paths, TEMPORARY) else 'yes'}",
        *(f"ReadWritePaths={_word(path)}" for path in writable),
        "ProtectKernelTunables=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelLogs=yes",
        "ProtectControlGroups=yes",
        "ProtectClock=yes",
        "ProtectHostname=yes",
        "RestrictNamespaces=yes",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    ]


def _any_within(paths: Sequence[str], folders: Sequence[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for path in paths for folder in folders)


def _plain(path: str) -> str:
    """A path where systemd takes the whole line."""
    return path.replace("%", "%%")


def _word(text: str) -> str:
    """One word of a list, whatever is in it."""
    escaped = _plain(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _argument(text: str) -> str:
    """One word of a command, where ``$`` has a meaning too."""
    return _word(text.replace("$", "$$"))


def _text(*lines: str) -> str:
    return "\n".join(lines) + "\n"
