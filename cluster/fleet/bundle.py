"""Everything that hosts without internet need to run this version: wheels for their Python and machine, in one archive.

The archive is a tar of ``wheels/``, ``constraints.txt`` and ``manifest.json``, which says what each file's SHA-256 is.
A release on a host is called after the manifest's: the same content is the same release.
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from cluster.rundir import ClusterFault
from tracehaul import __version__

MANIFEST = "manifest.json"
SOURCE = Path(__file__).resolve().parents[2]
"""Of this checkout, if it is one."""
_MANYLINUX = ("1", "2010", "2014", *(f"_2_{minor}" for minor in range(5, 32)))
"""What glibc 2.31 runs, in the spellings that wheels use: pip takes none for another."""
_DIGEST_CHARS = 12
_PIECE_BYTES = 1 << 22
_PIP_S = 1800.0


class Manifest(msgspec.Struct, frozen=True):
    """What is in a bundle."""

    version: str
    python: str
    """Whose wheels these are: ``3.11``."""
    machine: str
    files: dict[str, str]
    """SHA-256 of each, by its name in the archive."""


class Bundle(msgspec.Struct, frozen=True):
    """An archive on this machine."""

    path: Path
    manifest: Manifest
    digest: str
    """Of the manifest's bytes."""

    @property
    def release(self) -> str:
        """What hosts call it."""
        return f"{self.manifest.version}-{self.digest[:_DIGEST_CHARS]}"


def make_bundle(
    folder: Path, python: str, machine: str, told: Callable[[str], None], extra: Sequence[str] = ()
) -> Bundle:
    """A bundle for hosts of that Python and machine, in ``folder``.

    From a checkout its own packages are built, with the tested torch beside them; an installation has them fetched.
    ``extra``: options for pip (``--index-url``, ``--find-links``).

    Raises:
        ClusterFault: pip cannot have all of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".bundle-") as scratch:
        wheels = Path(scratch) / "wheels"
        wheels.mkdir()
        constraints = Path(scratch) / "constraints.txt"
        if (SOURCE / "store" / "pyproject.toml").exists():
            constraints.write_bytes((SOURCE / "constraints.txt").read_bytes())
            told("building tracehaul's own wheels")
            _pip("wheel", "--no-deps", "--wheel-dir", str(wheels), f"{SOURCE}/store", str(SOURCE))
        else:
            constraints.write_text("")
        common = ["--constraint", str(constraints), "--find-links", str(wheels), *extra, f"tracehaul=={__version__}"]
        told("fetching what it needs")
        if (python, machine) == (f"{sys.version_info.major}.{sys.version_info.minor}", _machine()):
            _pip("wheel", "--wheel-dir", str(wheels), *common)
        else:  # of another Python nothing can be built here
            platforms = [word for part in _MANYLINUX for word in ("--platform", f"manylinux{part}_{machine}")]
            only = ["--only-binary", ":all:", "--python-version", python, "--implementation", "cp", *platforms]
            _pip("download", "--dest", str(wheels), *only, *common)
        told("packing it")
        return _pack(Path(scratch), folder, python, machine)


def _machine() -> str:
    import platform

    return platform.machine()


def _pip(*words: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        words[0],
        "--disable-pip-version-check",
        "--no-input",
        "--quiet",
        *words[1:],
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterFault(f"cannot run pip: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if "WARNING" not in line]
        raise ClusterFault("pip cannot have all that a bundle needs: " + " / ".join(lines[-3:]))


def _pack(scratch: Path, folder: Path, python: str, machine: str) -> Bundle:
    names = [path.relative_to(scratch).as_posix() for path in sorted(scratch.rglob("*")) if path.is_file()]
    manifest = Manifest(__version__, python, machine, {name: digest_of(scratch / name) for name in names})
    told = msgspec.json.format(msgspec.json.encode(manifest))
    (scratch / MANIFEST).write_bytes(told)
    digest = hashlib.sha256(told).hexdigest()
    target = folder / f"tracehaul-{__version__}-py{python}-{machine}-{digest[:_DIGEST_CHARS]}.tar"
    fresh = folder / f".{target.name}.tmp"
    with tarfile.open(fresh, "w") as archive:
        for name in (MANIFEST, *names):
            archive.add(scratch / name, name)
    fresh.replace(target)
    return Bundle(target, manifest, digest)


def read_bundle(path: Path) -> Bundle:
    """A bundle that was made before.

    Raises:
        ClusterFault: it is none.
    """
    try:
        with tarfile.open(path) as archive:
            file = archive.extractfile(MANIFEST)
            told = file.read() if file is not None else b""
        return Bundle(path, msgspec.json.decode(told, type=Manifest), hashlib.sha256(told).hexdigest())
    except (OSError, tarfile.TarError, KeyError, msgspec.DecodeError) as error:
        raise ClusterFault(f"{path} is no bundle: {error}; make one with: tracehaul bundle") from error


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    summed = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            summed.update(piece)
    return summed.hexdigest()
