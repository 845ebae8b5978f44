"""The server's certificate, which may be renewed while it serves."""

import ssl
from pathlib import Path

from router.http.config import ApiConfig
from tracehaul.runtime.files import Watched
from tracehaul.runtime.log import Log

log = Log(__name__)


class Certificate:
    """A certificate and its key in files, as a live TLS context."""

    def __init__(self, cert: Path, key: Path | None = None) -> None:
        """``key``: None if it is in the same file.

        Raises:
            OSError, ssl.SSLError: they cannot be read, or do not belong together.
        """
        self._cert = cert
        self._key = key
        self._watched = Watched(cert, *([key] if key is not None else []))
        self._watched.changed()
        self.context = self._load()

    def refresh(self) -> None:
        """Take the files' new content for connections to come, if it has changed and makes sense; those that are open
        go on."""
        if not self._watched.changed():
            return
        try:
            self._load()  # first into one that nobody uses: what fails halfway leaves a context without a key
            self.context.load_cert_chain(self._cert, self._key)
        except (OSError, ssl.SSLError) as error:
            log.warning("a new certificate cannot be used: the old one stays", cert=self._cert, why=error)
            return
        log.info("a new certificate is used", cert=self._cert)

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._cert, self._key)
        return context


def certificate_of(config: ApiConfig) -> Certificate | None:
    """What the config names; None: nothing.

    Raises:
        OSError, ssl.SSLError: as :class:`Certificate`.
    """
    if not config.tls_cert:
        return None
    return Certificate(Path(config.tls_cert), Path(config.tls_key) if config.tls_key else None)
