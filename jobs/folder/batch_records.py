"""A batch as it is kept: one small file, replaced whole."""

from pathlib import Path

import msgspec

from jobs.batch import Batch
from tracehaul.runtime.durable import write_whole
from tracehaul.runtime.log import Log

log = Log(__name__)


def write_batch(path: Path, batch: Batch) -> None:
    """It is on the disk. Raises OSError."""
    write_whole(path, msgspec.json.encode(batch), private=True)


def read_batch(path: Path) -> Batch | None:
    """None: it cannot be read, which the log says."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Batch)
    except (OSError, msgspec.DecodeError, UnicodeError) as error:
        log.warning("a batch cannot be read: it is left out", path=path, why=error)
        return None
