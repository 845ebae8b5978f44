"""Logs that stay small although whoever writes them holds them open, and the last lines of them."""

import os
import shutil
from pathlib import Path

LOG_BYTES_MAX = 32 << 20
"""Of a log; the part before it, of the same size, is in ``NAME.log.1``."""
TAIL_BYTES = 4 << 20


def before(path: Path) -> Path:
    """Where the part before a log is."""
    return path.with_name(f"{path.name}.1")


def keep_small(path: Path, bytes_max: int = LOG_BYTES_MAX) -> bool:
    """Begins the log anew if it is large: what it has is copied beside it, for its writer appends to the open file.

    Lines written between the copy's end and the cut are lost. On a full disk the old part is lost whole rather than
    the disk kept full. Returns whether it was begun anew.

    Raises:
        OSError: it cannot be cut.
    """
    try:
        if path.stat().st_size <= bytes_max:
            return False
    except FileNotFoundError:
        return False
    old = before(path)
    with path.open("r+b") as log:
        try:
            with old.open("wb") as copy:
                shutil.copyfileobj(log, copy, 1 << 20)
        except OSError:
            old.unlink(missing_ok=True)
        log.truncate(0)
    return True


def last_lines(path: Path, lines: int) -> list[str]:
    """Of a log and the part before it; nothing where there is none."""
    found: list[str] = []
    for part in (path, before(path)):
        try:
            with part.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
                found = file.read().decode(errors="replace").splitlines()[-lines:] + found
        except OSError:
            continue
        if len(found) >= lines:
            break
    return found[-lines:] if lines else []
