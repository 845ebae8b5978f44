"""Brings a release, and models, to a host: copied once, checked by hash, switched to by a link."""

import os
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
        told(f"copying {bundle.path.stat().st_size >> 20} MB")
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
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    path = shlex.quote(target)
    script = (
        f"umask 077 && mkdir -p {shlex.quote(os.path.dirname(target))} && cat > {path}.tmp && "
        f"test $(wc -c < {path}.tmp) -eq {size} && chmod {mode} {path}.tmp && mv {path}.tmp {path}"
    )
    done = await way.run(["sh", "-c", script], source, 60.0 + size / COPY_BYTES_S)
    if done.code != 0:
        raise HostFault(f"cannot write {target}: {done.last_line or 'not all of it arrived: is the disk full?'}")


async def put_model(way: Connection, facts: Facts, source: Path, digest: str, told: Told) -> str:
    """A model's file or folder there, under its digest; returns its path.

    Raises:
        HostFault: it cannot be copied, or arrives damaged.
    """
    target = f"{facts.home}/models/{digest[:16]}/{source.name}"
    if (await way.run(["test", "-e", target])).code == 0:
        return target
    fresh = f"{facts.home}/models/.{digest[:16]}.tmp"
    with tempfile.TemporaryDirectory() as folder:
        archive = source
        if source.is_dir():
            archive = Path(folder) / "model.tar"
            with tarfile.open(archive, "w", dereference=True) as tar:
                tar.add(source, source.name, filter=_visible)
        told(f"copying the model, {archive.stat().st_size >> 20} MB")
        take = "tar x" if source.is_dir() else f"cat > {shlex.quote(source.name)}"
        final = shlex.quote(f"{facts.home}/models/{digest[:16]}")
        quoted = shlex.quote(fresh)
        script = (
            f"rm -rf {quoted} && mkdir -p {quoted} && cd {quoted} && {take} && rm -rf {final} && mv {quoted} {final}"
        )
        done = await way.run(["sh", "-c", script], archive, 60.0 + archive.stat().st_size / COPY_BYTES_S)
    if done.code != 0:
        raise HostFault(f"cannot copy the model: {done.last_line}")
    return target


def _visible(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The hub's caches beside a model do not travel."""
    return None if Path(entry.name).name.startswith(".") else entry
