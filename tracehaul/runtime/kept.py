"""Files that spare a process what another has computed already: written whole, checked when read, never needed.

Each begins with a digest of all that follows, so one that is torn, cut off or of somebody else is not read but made
anew. What is read is mapped: processes that read one file share its memory, and keep it after the file is replaced.
"""

import fcntl
import mmap
import struct
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from xxhash import xxh3_128

HEADER_BYTES = 64
"""What is read lies so far behind the start of a page."""
_MAGIC = b"tracehaul kept 1"
_HEADER = struct.Struct("<16sQ16s")
_POLL_S = 0.05
_UNFINISHED = ".tmp"


@contextmanager
def alone(path: Path, wait_s: float) -> Generator[bool]:
    """Wait for a lock that the system drops with its process; False if another process held it all the time.

    Raises:
        OSError: there can be no such file.
    """
    pause = threading.Event()
    with path.open("w") as file:
        for _ in range(int(wait_s / _POLL_S) + 1):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pause.wait(_POLL_S)
            else:
                yield True
                return
        yield False


def read(path: Path) -> memoryview | None:
    """What :func:`write` was given, in memory that may be written without changing the file; None: it is not there.

    The file counts as used now.
    """
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):  # no file, or an empty one
        return None
    if len(memory) < HEADER_BYTES:
        return None
    magic, size, digest = _HEADER.unpack_from(memory)
    content = memoryview(memory)[HEADER_BYTES:]
    if magic != _MAGIC or size != len(content) or digest != xxh3_128(content).digest():
        return None
    with suppress(OSError):
        path.touch()
    return content


def write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Put ``parts``, one after the other, where :func:`read` finds them. One process writes a path at a time.

    Raises:
        OSError: there is no room, or no permission; what was there before still is.
    """
    fresh = path.with_name(path.name + _UNFINISHED)
    try:
        with fresh.open("wb") as file:
            file.write(bytes(HEADER_BYTES))
            digest = xxh3_128()
            size = 0
            for part in parts:
                digest.update(part)
                size += memoryview(part).nbytes
                file.write(part)
            file.seek(0)
            file.write(_HEADER.pack(_MAGIC, size, digest.digest()))
        fresh.replace(path)
    except OSError:
        with suppress(OSError):
            fresh.unlink()
        raise


def forget_old(folder: Path, pattern: str, keep: int) -> None:
    """Remove all files of that pattern but those used last, and the remains of writers that were killed.

    Raises:
        OSError: that is not permitted.
    """
    files = sorted(folder.glob(pattern), key=_used_ns, reverse=True)
    left = [file for file in files if not file.name.endswith(_UNFINISHED)][:keep]
    for file in files:
        if file not in left:
            file.unlink(missing_ok=True)


def _used_ns(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:  # removed meanwhile
        return 0
