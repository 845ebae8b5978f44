"""What a host has of its cluster's certificates, and which of its nodes use them: for ``tracehaul certificates``."""

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from cluster.rundir import ClusterFault, RunDir
from cluster.security.secrets import FOLDER
from tracehaul.runtime.credentials import CA_FILE, CERT_FILE


class HostCertificates(msgspec.Struct, frozen=True):
    """Files of a folder of secrets, and what nodes say."""

    ca: str
    """PEM: the CAs that it trusts, one after the other; empty: none."""
    cert: str
    """PEM; empty: it has none."""
    uses: dict[str, str]
    """The mark of what each node uses, as it said last; empty: it has not said."""


def certificates_of(run: RunDir, names: list[str]) -> HostCertificates:
    """Of the host whose run directory that is, and those nodes of it.

    Raises:
        ClusterFault: a file cannot be read.
    """
    ca, cert = (_text(run.path / FOLDER / name) for name in (CA_FILE, CERT_FILE))
    return HostCertificates(ca, cert, {name: run.state(name).certificates for name in names})


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterFault(f"cannot read {path}: {error}") from error


def certificates_command(
    names: Annotated[list[str] | None, typer.Argument(help="Nodes.")] = None,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Where this host's state is.")] = Path(".run"),
) -> None:
    """Tell which certificates this host has, and which these nodes use, as JSON."""
    sys.stdout.write(msgspec.json.encode(certificates_of(RunDir(run_dir), names or [])).decode())
