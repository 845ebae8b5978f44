"""Who this node is to others: its certificate, its key and the CAs that it trusts, in files that may be renewed.

Both ends of every connection show a certificate of a trusted CA, in TLS 1.3 and nothing older. A connection is made
with what the files say then; one that is open goes on as it was made.
"""

import hashlib
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tracehaul.runtime.files import Watched
from tracehaul.runtime.log import Log

log = Log(__name__)

CA_FILE, CERT_FILE, KEY_FILE = "ca.pem", "node.pem", "node.key"
NAME_SCHEME = "tracehaul:"
"""Before a node's name in the certificate of a host that has several nodes."""
HANDSHAKE_S = 5.0
"""Who takes longer to show a certificate is cut off."""

_REASONS = {
    "TLSV1_ALERT_UNKNOWN_CA": "it does not trust the CA of this node's certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate, and this node has none",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "this node's certificate has expired",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it refuses this node's certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it refuses this node's certificate",
    "TLSV1_ALERT_DECRYPT_ERROR": "it does not trust the CA of this node's certificate",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it shows no certificate",
    "WRONG_VERSION_NUMBER": "it speaks no TLS",
    "HTTP_REQUEST": "it speaks no TLS",
    "UNSUPPORTED_PROTOCOL": "it speaks an old TLS",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it speaks an old TLS",
}
_VERIFIED = {
    "self-signed certificate in certificate chain": "of an unknown CA",
    "unable to get local issuer certificate": "of an unknown CA",
    "self-signed certificate": "of no CA",
    "certificate signature failure": "of an unknown CA",
    "certificate has expired": "expired",
    "certificate is not yet valid": "not valid yet: are the clocks right?",
}


class Contexts(NamedTuple):
    """For connections to be made now."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    version: int
    """Grows with each change of the files."""
    mark: str
    """Of the certificates: :func:`mark_of`."""


class Credentials:
    """The files ``ca.pem`` (one CA or, while they change, several), ``node.pem`` and ``node.key`` of a folder."""

    def __init__(self, folder: Path) -> None:
        """Raises:
        OSError, ssl.SSLError: they cannot be read, or do not belong together.
        """
        self._folder = folder
        self._watched = Watched(*(folder / name for name in (CA_FILE, CERT_FILE, KEY_FILE)))
        self._watched.changed()
        self.now = self._load(1)
        self.told: Callable[[str], None] = lambda mark: None
        """Told the new mark when new files are used."""

    def refresh(self) -> None:
        """Use the files' new content for connections to come, if it has changed and makes sense."""
        if not self._watched.changed():
            return
        try:
            self.now = self._load(self.now.version + 1)
        except (OSError, ssl.SSLError) as error:
            log.warning("new certificates cannot be used: the old ones stay", folder=self._folder, why=error)
            return
        log.info("new certificates are used", folder=self._folder)
        self.told(self.now.mark)

    def _load(self, version: int) -> Contexts:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.verify_mode = ssl.CERT_REQUIRED
        server.num_tickets = 0  # a session taken up again would not be checked again
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for context in (server, client):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_verify_locations(self._folder / CA_FILE)
            context.load_cert_chain(self._folder / CERT_FILE, self._folder / KEY_FILE)
        mark = mark_of(*((self._folder / name).read_bytes() for name in (CA_FILE, CERT_FILE)))
        return Contexts(server, client, version, mark)


def mark_of(ca: bytes, cert: bytes) -> str:
    """Names what a node trusts and what it shows; both PEM."""
    return hashlib.blake2b(ca + b"\0" + cert, digest_size=8).hexdigest()


def names_of(certificate: Mapping[str, Any] | None) -> frozenset[str] | None:
    """The nodes that a peer's certificate is of, as ``getpeercert`` tells it; None: the peer showed none.

    A certificate that says no nodes is of the one that its subject names.
    """
    if not certificate:
        return None
    uris = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    nodes = [uri.removeprefix(NAME_SCHEME) for uri in uris if uri.startswith(NAME_SCHEME)]
    subject = [value for part in certificate["subject"] for key, value in part if key == "commonName"]
    return frozenset(nodes or subject)


def why_refused(error: BaseException) -> str:
    """What kept a connection from being trusted, in a few words about the peer."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {_VERIFIED.get(error.verify_message, error.verify_message)}"
    if isinstance(error, ssl.SSLError):
        reason = error.reason or str(error)
        return _REASONS.get(reason, reason.replace("_", " ").lower())
    return str(error) or type(error).__name__
