"""What a node uses of the folder of secrets beside its plan: certificates, and the join token."""

import os
import ssl
from pathlib import Path
from typing import NamedTuple

from cluster.plan import Plan, load_plan
from cluster.rundir import ClusterFault, RunDir
from tracehaul.rpc.session import Limits
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime.credentials import Credentials
from tracehaul.transfer.tcp_proof import Guard

FOLDER = "secrets"
TOKEN_FILE = "join.token"  # noqa: S105 - a file's name
"""The token in its first line; while it is being replaced, the old one in the second."""


class Networks(NamedTuple):
    """What a node needs of the cluster's secrets."""

    control: TcpNetwork
    credentials: Credentials | None
    """None: the control plane is plain."""
    data: Guard | None
    """None: the data plane is plain."""
    tokens: tuple[str, ...]
    """Those of the join token's file, if the cluster has one: the first is shown, each is taken."""


PLAIN = Networks(TcpNetwork(), None, None, ())


def networks_of(plan: Plan, run: RunDir) -> Networks:
    """What the plan's ``[security]`` asks for, from the folder of secrets beside the plan.

    Raises:
        ClusterFault: it is not there, or cannot be used.
    """
    security, folder = plan.config.security, run.path / FOLDER
    credentials = _credentials(folder) if security.control == "mtls" else None
    data = Guard(credentials, security.data == "tls") if credentials is not None and security.proves_data else None
    tokens = read_tokens(folder) if security.token else ()
    control = TcpNetwork(Limits(connections_max=plan.config.connections_max), credentials=credentials)
    return Networks(control, credentials, data, tokens)


def networks_here(run: RunDir) -> Networks:
    """The same for commands that are run beside a plan; where there is none all is plain.

    Raises:
        ClusterFault: as :func:`networks_of`.
    """
    if not run.plan_file.exists():
        return PLAIN
    return networks_of(load_plan(run), run)


def read_tokens(folder: Path) -> tuple[str, ...]:
    """Each line of the token's file.

    Raises:
        ClusterFault: there is none, it is empty, or others may read it.
    """
    path = folder / TOKEN_FILE
    try:
        with path.open() as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise ClusterFault(f"others may read {path}: chmod 600 it")
            tokens = tuple(filter(None, map(str.strip, file)))
    except (OSError, ValueError) as error:
        raise ClusterFault(f"the join token cannot be read: {error}") from error
    if not tokens:
        raise ClusterFault(f"there is no join token in {path}")
    return tokens


def _credentials(folder: Path) -> Credentials:
    try:
        return Credentials(folder)
    except (OSError, ssl.SSLError) as error:
        raise ClusterFault(f"the certificates in {folder} cannot be used: {error}") from error
