"""Real faults of a disk for tests: one that is full, read-only, broken, gone, or somebody else's. Wants root."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

Kind = Literal["ENOSPC", "EROFS", "EIO", "EACCES", "vanished"]
NOBODY = 65534
WITHOUT_PRIVILEGE = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
"""Before a command of root's, who then is refused what belongs to others."""


def can_mount() -> bool:
    """Whether file systems can be mounted here."""
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
        if made.returncode == 0:
            _run("umount", folder)
        return made.returncode == 0


@contextmanager
def small_disk(size: str) -> Generator[Path]:
    """A file system of that size, which others may look into."""
    folder = Path(tempfile.mkdtemp(prefix="tracehaul-disk-"))
    _run("mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        _run("umount", "-l", str(folder))
        folder.rmdir()


@contextmanager
def refusing(kind: Kind, folder: Path) -> Generator[list[str]]:
    """``folder``, on a :func:`small_disk`, takes nothing. Gives what comes before a command so that it meets that.

    What is open already stays writable, but on a full disk.
    """
    match kind:
        case "ENOSPC":
            with _full(folder.parent):
                yield []
        case "EROFS":
            with _over(folder, "--bind", str(folder)):
                _run("mount", "-o", "remount,ro,bind", str(folder))
                yield []
        case "vanished":
            with _over(folder, "-t", "tmpfs", "tmpfs"):
                yield []
        case "EIO":
            with _broken(folder):
                yield []
        case "EACCES":
            for path in (folder, *folder.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
            try:
                yield WITHOUT_PRIVILEGE
            finally:
                for path in (folder, *folder.rglob("*")):
                    os.chown(path, os.getuid(), os.getgid())


@contextmanager
def _full(disk: Path) -> Generator[None]:
    fill = disk / "fill"
    with fill.open("wb", buffering=0) as file:
        size = 1 << 16
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    try:
        yield
    finally:
        fill.unlink()


@contextmanager
def _over(folder: Path, *how: str) -> Generator[None]:
    _run("mount", *how, str(folder))
    try:
        yield
    finally:
        _run("umount", "-l", str(folder))


@contextmanager
def _broken(folder: Path) -> Generator[None]:
    """On a disk that lost everything: a file system whose device is cut off."""
    with tempfile.TemporaryDirectory() as elsewhere:
        image, mounted = Path(elsewhere) / "image", Path(elsewhere) / "mounted"
        image.write_bytes(b"")
        os.truncate(image, 8 << 20)
        mounted.mkdir()
        _run("mkfs.ext4", "-q", "-O", "^has_journal", str(image))
        _run("mount", "-o", "loop", str(image), str(mounted))
        try:
            shutil.copytree(folder, mounted, dirs_exist_ok=True)
            _run("sync", "-f", str(mounted))
            with _over(folder, "--bind", str(mounted)):
                os.truncate(image, 0)
                Path("/proc/sys/vm/drop_caches").write_text("3")
                yield
        finally:
            _run("umount", "-l", str(mounted))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
