"""The HTTP API of a running cluster, as this command line reaches it: where it is, by which key, over which TLS."""

import os
import secrets
import ssl
from collections.abc import Mapping
from pathlib import Path

import httpx
import msgspec

from cluster.plan import Plan, api_url
from cluster.rundir import ClusterFault, RunDir
from router.http.keys import ID_BYTES, PREFIX, SECRET_BYTES, Key, hashed, name_of


class Api(msgspec.Struct, frozen=True):
    """Where it is, and how it is asked."""

    url: str
    key: str | None = None
    """None: it asks for none."""
    certificate: Path | None = None
    """The one that it must have; None: one that this machine trusts, if any."""

    def client(self, timeout_s: float) -> httpx.Client:
        """Asks it.

        Raises:
            ClusterFault: the certificate cannot be read.
        """
        return httpx.Client(
            base_url=self.url.rstrip("/"),
            headers={} if self.key is None else {"authorization": f"Bearer {self.key}"},
            verify=True if self.certificate is None else trusting(self.certificate),
            timeout=timeout_s,
            trust_env=False,
        )

    def get(self, path: str, timeout_s: float, params: Mapping[str, str] | None = None) -> httpx.Response:
        """One page.

        Raises:
            ClusterFault: as :meth:`client`; or nobody answers, or refuses the key.
        """
        try:
            with self.client(timeout_s) as client:
                answer = client.get(path, params=params)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ClusterFault(f"no router answers at {self.url}: {error}") from error
        if answer.status_code in (401, 403):
            raise ClusterFault(f"the router at {self.url} wants a key that may steer: give one with --key")
        return answer


def here(plan: Plan, run: RunDir) -> Api:
    """Of the cluster that was started in this run directory; of a fleet, its first router's."""
    try:
        key = run.operator_key.read_text().strip() or None
    except OSError:
        key = None
    return Api(api_url(plan), key, Path(tls_cert) if (tls_cert := plan.config.api.tls_cert) else None)


def make_operator_key(run: RunDir) -> None:
    """A new one, for whoever may read the run directory as we do."""
    write_private(run.operator_key, new_secret().encode())


def operator_key(run: RunDir) -> Key | None:
    """What the router keeps of it; None: there is none."""
    try:
        sent = run.operator_key.read_text().strip()
    except OSError:
        return None
    name = name_of(sent)
    return None if name is None else Key(name, hashed(sent), steer=True, note="of this launch")


def new_secret() -> str:
    """A key that nobody has had."""
    return f"{PREFIX}{secrets.token_hex(ID_BYTES)}-{secrets.token_urlsafe(SECRET_BYTES)}"


def write_private(path: Path, data: bytes) -> None:
    """Replace the file whole, so that nobody reads half of it; only its owner may read it at all.

    Raises:
        OSError: it cannot be written.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o600)  # also one that was left by a killed process
            file.write(data)
            file.flush()
            os.fsync(handle)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def trusting(certificate: Path) -> ssl.SSLContext:
    """For clients on the server's own machine, who know it by its certificate whatever name that is made out to.

    Raises:
        ClusterFault: it cannot be read.
    """
    try:
        context = ssl.create_default_context(cafile=str(certificate))
    except (OSError, ssl.SSLError) as error:
        raise ClusterFault(f"cannot read the certificate {certificate}: {error}") from error
    context.check_hostname = False
    context.verify_flags = ssl.VERIFY_X509_PARTIAL_CHAIN  # the first of a chain is enough
    return context
