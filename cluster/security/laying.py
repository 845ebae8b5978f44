"""Lays what a host's nodes need into the folder of secrets beside their plan: for the side that launches."""

import secrets
from collections.abc import Sequence
from pathlib import Path

from cluster.config import ClusterConfig
from cluster.plan import NodeSpec, Plan
from cluster.rundir import ClusterFault, RunDir
from cluster.security.ca import AUTHORITY_FILE, Issued, ensure_ca, issue, trusted
from cluster.security.secrets import FOLDER, TOKEN_FILE, read_tokens
from tracehaul.runtime.credentials import CA_FILE, CERT_FILE, KEY_FILE
from tracehaul.runtime.durable import write_whole

AUTHORITY = "authority"
LOCAL = "local"
"""A cluster, and a host, that nobody has named."""
TOKEN_BYTES = 32
_END = b"-----END CERTIFICATE-----"


def secure(plan: Plan, run: RunDir, *, now_s: float) -> None:
    """Lay what the nodes of a cluster on this machine need beside their plan. The CA is kept there, too.

    Raises:
        ClusterFault: that cannot be written.
    """
    security, folder = plan.config.security, run.path / FOLDER
    if security.control == "mtls":
        authority = run.path / AUTHORITY
        ensure_ca(authority, plan.config.name or LOCAL, now_s=now_s)
        lay(folder, certify(authority, LOCAL, plan.nodes, now_s=now_s))
    if security.token:
        ensure_token(folder)


def authority_of(config: ClusterConfig) -> Path:
    """Where the side that launches a fleet keeps its CA."""
    return Path(
        config.security.authority or Path.home() / ".tracehaul" / "authority" / (config.name or LOCAL)
    ).expanduser()


def replacing(config: ClusterConfig) -> bool:
    """Whether a fleet's CA is being replaced: then not all hosts need trust the new one, of which certificates are.

    Raises:
        ClusterFault: the CA cannot be read.
    """
    authority = authority_of(config)
    return config.security.control == "mtls" and (authority / AUTHORITY_FILE).exists() and len(trusted(authority)) > 1


def files_for(
    config: ClusterConfig, host: str, nodes: Sequence[NodeSpec], there: bytes, *, now_s: float
) -> dict[str, bytes]:
    """What the folder of secrets of a fleet's host must hold, by name, in the order to write it. ``nodes``: that run
    there. ``there``: the CAs that it trusts now; empty: none.

    Raises:
        ClusterFault: the CA cannot be used, or is not the one that the host trusts.
    """
    security, authority = config.security, authority_of(config)
    files: dict[str, bytes] = {}
    if security.control == "mtls":
        ours = ensure_ca(authority, config.name or LOCAL, now_s=now_s)
        if there.strip() and not set(_each(there)) & set(_each(ours)):
            raise ClusterFault(
                f"the host trusts another CA than the one in {authority}: bring that of the machine which launched it, "
                f"or remove run/{FOLDER}/{CA_FILE} on every host"
            )
        issued = certify(authority, host, nodes, now_s=now_s)
        files |= {CA_FILE: issued.ca, KEY_FILE: issued.key, CERT_FILE: issued.cert}
    if security.token:
        ensure_token(authority)
        files[TOKEN_FILE] = (authority / TOKEN_FILE).read_bytes()
    return files


def _each(bundle: bytes) -> list[bytes]:
    return [part.strip() for part in bundle.split(_END) if part.strip()]


def certify(authority: Path, host: str, specs: Sequence[NodeSpec], *, now_s: float) -> Issued:
    """A certificate for a host, of all nodes that run there, at every address that others reach them by.

    Raises:
        ClusterFault: there is no CA, or a name cannot stand in a certificate.
    """
    addresses = dict.fromkeys(filter(None, (at for spec in specs for at in (spec.address, spec.data_address))))
    return issue(authority, host, list(addresses), now_s=now_s, nodes=[spec.name for spec in specs])


def lay(folder: Path, issued: Issued) -> None:
    """Put what was issued into a folder of secrets; who uses it takes it for connections to come.

    Raises:
        ClusterFault: it cannot be written.
    """
    lay_ca(folder, issued.ca)
    _put(folder, KEY_FILE, issued.key)
    _put(folder, CERT_FILE, issued.cert)


def lay_ca(folder: Path, ca: bytes) -> None:
    """Replace the CAs that a folder's owner trusts.

    Raises:
        ClusterFault: it cannot be written.
    """
    _put(folder, CA_FILE, ca)


def ensure_token(folder: Path) -> str:
    """The join token kept in ``folder``; made if there is none.

    Raises:
        ClusterFault: it can be neither read nor written.
    """
    if not (folder / TOKEN_FILE).exists():
        _put(folder, TOKEN_FILE, f"{secrets.token_urlsafe(TOKEN_BYTES)}\n".encode())
    return read_tokens(folder)[0]


def _put(folder: Path, name: str, data: bytes) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(folder / name, data, private=True)
    except OSError as error:
        raise ClusterFault(f"{folder / name} cannot be written: {error}") from error
