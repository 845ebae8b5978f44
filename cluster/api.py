"""The HTTP API of a running cluster, as this command line reaches it: where it is, by which key, over which TLS."""

import secrets
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        return httpx.Client(**self.options(), timeout=timeout_s)

    def options(self) -> dict[str, Any]:
        """Of whatever client of httpx asks it.

        Raises:
            ClusterFault: as :meth:`client`.
        """
        return {
            "base_url": self.url.rstrip("/"),
            "headers": {} if self.key is None else {"authorization": f"Bearer {self.key}"},
            "verify": True if self.certificate is None else trusting(self.certificate),
            "trust_env": False,
        }

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
    run.write_operator_key(new_secret().encode())


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
