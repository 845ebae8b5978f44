"""Brings a release, and models, to a host: copied once, checked by hash, switched to by a link."""

import asyncio
import posixpath
import shlex
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from cluster.fleet import installer
from cluster.fleet.bundle import Bundle
from cluster.fleet.config import HostConfig
from cluster.fleet.connection import Connection, HostFault
from cluster.fleet.facts import Facts

COPY_BYTES_S = 1 << 20
"""A host that takes less than this is too slow to wait for."""
INSTALL_S = 1200.0

Told = Callable[[str], None]
"""Told a few words at each stage."""


class Wanted(msgspec.Struct, frozen=True):
    """What the installer is asked."""

    home: str
    release: str
    digest: str
    archive: str
    """In the home."""


async def install(way: Connection, host: HostConfig, facts: Facts, bundle: Bundle, told: Told) -> str:
    """Have that release on the host, and make it the current one; returns the path of its ``tracehaul`` there.

    Raises:
        HostFault: it cannot be copied or installed. The release that was current stays so.
    """
    wanted = f"{bundle.manifest.python} on {bundle.manifest.machine}"
    if not facts.python.startswith(f"{bundle.manifest.python}.") or facts.machine != bundle.manifest.machine:
        raise HostFault(f"the bundle is for Python {wanted}, and it has {facts.python} on {facts.machine}")
    release = f"{facts.home}/releases/{bundle.release}"
    archive = f"{bundle.release}.tar"
    there = await way.run(["test", "-e", f"{release}/{installer.MARKER}"])
    if there.code != 0:
        told(f"copying {size_of(bundle.path) >> 20} MB")
        await put(way, bundle.path, f"{facts.home}/{archive}")
        told("installing")
    asked = Wanted(facts.home, bundle.release, bundle.digest, archive)
    command = [host.python, "-", msgspec.json.encode(asked).decode()]
    done = await way.run(command, Path(installer.__file__), INSTALL_S)
    if done.code != 0:
        raise HostFault(f"cannot install: {done.last_line}")
    return f"{facts.home}/current/bin/tracehaul"


async def put(way: Connection, source: Path | bytes, target: str, *, mode: str = "600") -> None:
    """A file there, whole or not at all.

    Raises:
        HostFault: it cannot be written.
    """
    size = len(source) if isinstance(source, bytes) else size_of(source)
    path = shlex.quote(target)
    script = (
        f"umask 077 && mkdir -p {shlex.quote(posixpath.dirname(target))} && cat > {path}.tmp && "
        f"test $(wc -c < {path}.tmp) -eq {size} && chmod {mode} {path}.tmp && mv {path}.tmp {path}"
    )
    done = await way.run(["sh", "-c", script], source, _copy_s(size))
    if done.code != 0:
        raise HostFault(f"cannot write {target}: {done.last_line or 'not all of it arrived: is the disk full?'}")


async def put_model(way: Connection, source: Path, target: str, told: Told) -> None:
    """A model's file or folder there, whole or not at all, under its own name.

    Raises:
        HostFault: it cannot be copied.
    """
    folder = posixpath.dirname(target)
    with tempfile.TemporaryDirectory() as scratch:
        archive = await asyncio.to_thread(_packed, source, Path(scratch))
        told(f"copying the model, {size_of(archive) >> 20} MB")
        take = f"cat > {shlex.quote(source.name)}" if archive == source else "tar x"
        final, fresh = shlex.quote(folder), shlex.quote(f"{folder}.tmp")
        script = f"rm -rf {fresh} && mkdir -p {fresh} && cd {fresh} && {take} && rm -rf {final} && mv {fresh} {final}"
        done = await way.run(["sh", "-c", script], archive, _copy_s(size_of(archive)))
    if done.code != 0:
        raise HostFault(f"cannot copy the model: {done.last_line}")


def size_of(path: Path) -> int:
    """Bytes of a file."""
    return path.stat().st_size


def _copy_s(nbytes: int) -> float:
    """How long a copy may take."""
    return 60.0 + nbytes / COPY_BYTES_S


def _packed(source: Path, scratch: Path) -> Path:
    """One file of it: a folder becomes an archive."""
    if not source.is_dir():
        return source
    archive = scratch / "model.tar"
    with tarfile.open(archive, "w", dereference=True) as tar:
        tar.add(source, source.name, filter=_visible)
    return archive


def _visible(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The hub's caches beside a model do not travel."""
    return None if Path(entry.name).name.startswith(".") else entry
