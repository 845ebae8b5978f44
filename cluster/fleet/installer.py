"""Makes a release of a bundle on a host: sent to its Python through ssh, so this file stands alone.

It runs under Python 3.11 and newer, imports the standard library only, and is given
:class:`cluster.fleet.install.Wanted` as JSON in its argument. A release is complete once its marker is there; what a
killed installer left is made anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from typing import Any

PIECE_BYTES = 1 << 22
MARKER = "complete"


def digest(path: str) -> str:
    summed = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            summed.update(piece)
    return summed.hexdigest()


def fail(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.exit(1)


def run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        lines = done.stdout.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        fail(f"{command[0]}: {lines[-1]}")


def unpack(archive: str, folder: str, manifest_digest: str) -> dict[str, Any]:
    """The manifest; every file that it names is in ``folder``, and none else."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    manifest_file = os.path.join(folder, "manifest.json")
    if digest(manifest_file) != manifest_digest:
        fail("the bundle that arrived is another: its manifest has a wrong SHA-256")
    with open(manifest_file, encoding="utf-8") as file:
        manifest = json.load(file)
    for name, wanted in manifest["files"].items():
        if digest(os.path.join(folder, name)) != wanted:
            fail(f"the bundle is damaged: {name} has a wrong SHA-256")
    return manifest


def install(wanted: dict[str, Any]) -> None:
    home = os.path.expanduser(wanted["home"])
    release = os.path.join(home, "releases", wanted["release"])
    marker = os.path.join(release, MARKER)
    os.makedirs(os.path.dirname(release), exist_ok=True)
    with open(os.path.join(home, "install.lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two that install at once the second finds it done
        if not os.path.exists(marker):
            archive = os.path.join(home, wanted["archive"])
            shutil.rmtree(release, ignore_errors=True)
            unpacked = release + ".bundle"
            shutil.rmtree(unpacked, ignore_errors=True)
            manifest = unpack(archive, unpacked, wanted["digest"])
            run(sys.executable, "-m", "venv", release)
            pip = [os.path.join(release, "bin", "python"), "-m", "pip", "install", "--disable-pip-version-check"]
            offline = ["--no-index", "--find-links", os.path.join(unpacked, "wheels")]
            constraints = ["--constraint", os.path.join(unpacked, "constraints.txt")]
            quiet = ["--no-input", "--quiet", "--no-compile"]  # what is imported is compiled then
            run(*pip, *quiet, *offline, *constraints, "tracehaul==" + manifest["version"])
            with open(marker, "w", encoding="utf-8") as file:
                file.write(wanted["digest"] + "\n")
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(unpacked, ignore_errors=True)
            os.unlink(archive)
        current = os.path.join(home, "current")
        if os.path.realpath(current) != os.path.realpath(release):
            fresh = current + ".tmp"
            if os.path.lexists(fresh):
                os.unlink(fresh)
            os.symlink(release, fresh)
            os.replace(fresh, current)


if __name__ == "__main__":
    try:
        install(json.loads(sys.argv[1]))
    except (OSError, tarfile.TarError, ValueError, KeyError) as error:
        fail(str(error))
