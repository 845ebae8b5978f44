"""The order that a run directory remembers, and the release that nodes are started from."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cluster.hosts.orders import NodeReport, Order, Supervisor, digests
from cluster.plan import save_plan
from cluster.rundir import ClusterFault, RunDir
from tracehaul import __version__

ENVIRONMENT_FILE = "environment"
"""In the run directory: variables for the nodes, as credentials of a bucket; a line each, where it is."""


class Kept(msgspec.Struct, frozen=True):
    """What a supervisor goes on with when it is started anew."""

    order: Order
    supervisor: Supervisor
    stopped: tuple[str, ...] = ()
    """Nodes that an operator has stopped."""


def load(run: RunDir) -> Kept | None:
    """None: no host was ordered to do anything here.

    Raises:
        ClusterFault: there is something that cannot be read.
    """
    try:
        data = run.host_file.read_bytes()
        return msgspec.json.decode(data, type=Kept, dec_hook=lambda kind, value: kind(value))
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ClusterFault(f"cannot read {run.host_file}: {error}") from error


def save(run: RunDir, kept: Kept) -> None:
    """Puts it where :func:`load` finds it, and the plan where nodes find it.

    Raises:
        ClusterFault: the run directory cannot be written, and the nodes would read another plan than this.
    """
    try:
        run.create()
        save_plan(run, kept.order.plan)
        run.write_host(msgspec.json.encode(kept, enc_hook=str))
    except OSError as error:
        raise ClusterFault(f"cannot write the run directory {run.path}: {error.strerror}") from error


def interpreter() -> str:
    """The Python that nodes are run by: by its real folder, so that a link that is turned to another release is not
    followed by nodes of this one."""
    python = Path(os.path.realpath(sys.prefix)) / "bin" / Path(sys.executable).name
    return str(python) if python.exists() else sys.executable


def release() -> str:
    """Names the release that nodes are started from."""
    return f"{__version__} {interpreter()}"


def node_command(run: RunDir, name: str) -> list[str]:
    """What runs that node."""
    return [interpreter(), "-m", "cluster.cli", "node", name, "--config", str(run.plan_file)]


def digests_here(order: Order) -> dict[str, str]:
    """Of the order's nodes, started from this release."""
    return digests(order, release())


def idle_nodes(order: Order) -> tuple[NodeReport, ...]:
    """The order's nodes where nothing runs."""
    said = digests_here(order)
    return tuple(NodeReport(spec.name, spec.role, "stopped", digest=said[spec.name]) for spec in order.nodes)


def chosen(order: Order, names: Sequence[str]) -> list[str]:
    """These nodes of the order; all if none is named.

    Raises:
        ClusterFault: one is not this host's.
    """
    there = [spec.name for spec in order.nodes]
    if strangers := [name for name in names if name not in there]:
        raise ClusterFault(f"no node {strangers[0]} on this host; there are {', '.join(there)}")
    return list(dict.fromkeys(names)) or there
