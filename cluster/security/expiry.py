"""When a node's certificate ends, said in time."""

import asyncio
from pathlib import Path

from cryptography import x509

from cluster.rundir import ClusterFault
from tracehaul.runtime import clock
from tracehaul.runtime.credentials import CERT_FILE
from tracehaul.runtime.log import Log

log = Log(__name__)

DAY_S = 86400.0
SOON_S = 30 * DAY_S
EVERY_S = DAY_S / 4


async def watching(folder: Path, every_s: float = EVERY_S) -> None:
    """Warn while the certificate of a folder of secrets ends soon, for as long as it runs."""
    while True:
        try:
            left_s = expires_s(folder) - clock.wall_s()
            if left_s < SOON_S:
                log.warning("the certificate ends soon: launch again", folder=folder, days=round(left_s / DAY_S, 1))
        except ClusterFault as fault:
            log.warning("cannot tell when the certificate ends", why=fault)
        await asyncio.sleep(every_s)


def expires_s(folder: Path) -> float:
    """When the certificate of a folder of secrets ends, as wall time.

    Raises:
        ClusterFault: there is none.
    """
    try:
        cert = x509.load_pem_x509_certificate((folder / CERT_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise ClusterFault(f"the certificate in {folder} cannot be read: {error}") from error
    return cert.not_valid_after_utc.timestamp()
