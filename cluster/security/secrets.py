"""The folder of secrets beside a plan: a node's certificate, its key, the CAs it trusts, and the join token."""

import os
import secrets
import ssl
from pathlib import Path
from typing import NamedTuple

from cryptography import x509

from cluster.api import write_private
from cluster.rundir import ClusterFault
from cluster.security.ca import Issued
from cluster.security.config import SecurityConfig
from tracehaul.rpc.tcp import TcpNetwork
from tracehaul.runtime.credentials import CA_FILE, CERT_FILE, KEY_FILE, Credentials

FOLDER = "secrets"
TOKEN_FILE = "join.token"  # noqa: S105 - a file's name
"""The token in its first line; while it is being replaced, the old one in the second."""
TOKEN_BYTES = 32


class Networks(NamedTuple):
    """What a node needs of the cluster's secrets."""

    control: TcpNetwork
    credentials: Credentials | None
    """None: the control plane is plain."""
    data: Credentials | None
    """None: the data plane is plain."""
    tokens: tuple[str, ...]
    """Those of the join token's file, if the cluster has one: the first is shown, each is taken."""


def networks_of(security: SecurityConfig, run: Path) -> Networks:
    """What ``security`` asks for, from the folder of secrets in the run directory ``run``.

    Raises:
        ClusterFault: it is not there, or cannot be used.
    """
    folder = run / FOLDER
    credentials = _credentials(folder) if security.control == "mtls" else None
    data = credentials if security.data == "tls" else None
    tokens = read_tokens(folder) if security.token else ()
    return Networks(TcpNetwork(credentials=credentials), credentials, data, tokens)


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


def expires_s(folder: Path) -> float:
    """When the certificate of a folder of secrets expires, as wall time.

    Raises:
        ClusterFault: there is none.
    """
    try:
        cert = x509.load_pem_x509_certificate((folder / CERT_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise ClusterFault(f"the certificate in {folder} cannot be read: {error}") from error
    return cert.not_valid_after_utc.timestamp()


def _credentials(folder: Path) -> Credentials:
    try:
        return Credentials(folder)
    except (OSError, ssl.SSLError) as error:
        raise ClusterFault(f"the certificates in {folder} cannot be used: {error}") from error


def _put(folder: Path, name: str, data: bytes) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(folder / name, data)
    except OSError as error:
        raise ClusterFault(f"{folder / name} cannot be written: {error}") from error
