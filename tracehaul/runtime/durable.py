"""Files that are replaced whole: a reader sees the old content or the new, also after a loss of power."""

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, data: bytes, *, private: bool = False, durable: bool = True) -> None:
    """Replace the file, or make it.

    Args:
        path: which, in a folder that is there.
        data: all of it.
        private: only its owner may read it.
        durable: it is on the disk when this returns, and so is its name in the folder; else whenever the system likes.

    Raises:
        OSError: there is no room, or no permission; what was there before still is.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    mode = 0o600 if private else 0o666
    try:
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(handle, "wb", buffering=0) as file:
            if private:
                os.fchmod(handle, mode)  # also one that was left by a killed process
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            if durable:
                os.fsync(handle)
        fresh.replace(path)
    except OSError:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """The names in it are on the disk.

    Raises:
        OSError: the disk does not take them.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
