"""Looks at a host before anything is installed there: sent to its Python through ssh, so this file stands alone.

It runs under Python 3.8 and newer, imports the standard library only, and is given a :class:`cluster.fleet.facts.Asked`
as JSON in its argument; what it prints is a :class:`cluster.fleet.facts.Facts`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from typing import Any

PIECE_BYTES = 1 << 22
TOOL_S = 10


def read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def output(*command: str) -> str:
    """What a tool of the system prints; nothing if it is missing, fails or takes long."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=TOOL_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""


def available() -> int:
    """Bytes of memory, of the machine or of the control group that holds us, whichever has less."""
    lines = dict(line.split(":", 1) for line in read("/proc/meminfo").splitlines() if ":" in line)
    total, left = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    for line in read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files = "/sys/fs/cgroup" + path, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            files = "/sys/fs/cgroup/memory" + path, "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        limit, used = read(files[0] + "/" + files[1]), read(files[0] + "/" + files[2])
        if limit.isdigit() and used.isdigit() and int(limit) < total:
            total, left = int(limit), min(left, int(limit) - int(used))
    return max(0, left)


def memfd() -> str:
    """Why no memory can be shared between processes; empty: it can."""
    try:
        handle = os.memfd_create("tracehaul-probe")
        os.ftruncate(handle, 1 << 16)
        os.close(handle)
    except OSError as error:
        return error.strerror or "memfd_create fails"
    return ""


def room(path: str) -> int:
    """Bytes free where ``path`` is or would be."""
    while path and not os.path.exists(path):
        path = os.path.dirname(path)
    try:
        return shutil.disk_usage(path or "/").free
    except OSError:
        return 0


def writable(path: str) -> str:
    """Why nothing can be written there; empty: it can. Leaves nothing behind but the folder."""
    try:
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, ".probe")
        with open(probe, "wb") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
        os.unlink(probe)
    except OSError as error:
        return error.strerror or "cannot be written"
    return ""


def taken(listen: str, ports: list[int]) -> list[int]:
    """Those that somebody listens on already."""
    found: list[int] = []
    for port in ports:
        family = socket.AF_INET6 if ":" in listen else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((listen, port))
            except OSError as error:
                if error.errno == 98:  # EADDRINUSE
                    found.append(port)
    return found


def unbound(listen: str) -> str:
    """Why no socket can be bound to that address; empty: one can."""
    try:
        family = socket.getaddrinfo(listen, 0, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((listen, 0))
    except OSError as error:
        return error.strerror or str(error)
    return ""


def interfaces() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    told: list[dict[str, Any]] = json.loads(output("ip", "-j", "addr") or "[]")
    addresses = {each.get("ifname"): [a.get("local", "") for a in each.get("addr_info", ())] for each in told}
    for name in sorted(os.listdir("/sys/class/net")) if os.path.isdir("/sys/class/net") else []:
        folder = "/sys/class/net/" + name
        speed = read(folder + "/speed")
        found.append(
            {
                "name": name,
                "mtu": int(read(folder + "/mtu") or 0),
                "up": read(folder + "/operstate") in ("up", "unknown"),
                "mbit_s": int(speed) if speed.isdigit() else 0,
                "addresses": addresses.get(name, []),
            }
        )
    return found


def rdma() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    folder = "/sys/class/infiniband"
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        for port in sorted(os.listdir(folder + "/" + name + "/ports")):
            state = read(folder + "/" + name + "/ports/" + port + "/state")
            found.append({"name": name + ":" + port, "active": "ACTIVE" in state})
    return found


def ucx() -> list[dict[str, Any]]:
    """Devices that UCX finds here with their transports, if its own tool is there to be asked."""
    found: dict[str, list[str]] = {}
    transport = ""
    for line in output("ucx_info", "-d").splitlines():
        word, _, value = line.lstrip("# ").partition(":")
        if word == "Transport":
            transport = value.strip()
        elif word == "Device":
            found.setdefault(value.strip(), []).append(transport)
    return [{"name": name, "transports": transports} for name, transports in sorted(found.items())]


def gpus() -> list[dict[str, Any]]:
    asked = "name,memory.total,memory.free,driver_version"
    lines = output("nvidia-smi", "--query-gpu=" + asked, "--format=csv,noheader,nounits").splitlines()
    found: list[dict[str, Any]] = []
    for line in lines:
        name, total, free, driver = (part.strip() for part in line.split(","))
        found.append({"name": name, "bytes": int(total) << 20, "free_bytes": int(free) << 20, "driver": driver})
    return found


def digest(path: str, kept: str) -> str:
    """SHA-256 of a file, or of a folder's files with their names; known ones are kept by size and time of change."""
    files: list[str] = []
    if os.path.isdir(path):
        for folder, folders, names in os.walk(path, followlinks=True):
            folders[:] = sorted(each for each in folders if not each.startswith("."))
            files += [os.path.join(folder, name) for name in sorted(names) if not name.startswith(".")]
    elif os.path.isfile(path):
        files = [path]
    if not files:
        return ""
    known: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        known = json.loads(read(kept) or "{}")
    whole = hashlib.sha256()
    for file in files:
        stat = os.stat(file)
        key, mark = os.path.realpath(file), [stat.st_size, stat.st_mtime_ns]
        if key not in known or known[key][:2] != mark:
            known[key] = [*mark, file_digest(file)]
        whole.update((os.path.relpath(file, path) + "\0" + known[key][2] + "\n").encode())
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(kept), exist_ok=True)
        with open(kept + ".tmp", "w", encoding="utf-8") as out:
            json.dump(known, out)
        os.replace(kept + ".tmp", kept)
    return whole.hexdigest()


def file_digest(path: str) -> str:
    summed = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            summed.update(piece)
    return summed.hexdigest()


def python(command: str) -> tuple[str, str]:
    """Version of the Python that makes environments, and what it lacks for that."""
    asked = "import platform, venv, ensurepip; print(platform.python_version())"
    version = output(command, "-c", asked)
    if version:
        return version, ""
    version = output(command, "-c", "import platform; print(platform.python_version())")
    return version, "it has no venv or ensurepip" if version else "there is none"


def looked(asked: dict[str, Any]) -> dict[str, Any]:
    home = os.path.expanduser(asked["home"])
    version, lacks = python(asked["python"])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    libc = ctypes.CDLL(None)
    glibc = ""
    if hasattr(libc, "gnu_get_libc_version"):
        libc.gnu_get_libc_version.restype = ctypes.c_char_p
        glibc = libc.gnu_get_libc_version().decode()
    models = {name: os.path.expanduser(path) for name, path in asked["models"].items()}
    return {
        "boot_id": read("/proc/sys/kernel/random/boot_id"),
        "machine": platform.machine(),
        "glibc": glibc,
        "python": version,
        "python_lacks": lacks,
        "home": home,
        "home_fault": writable(home),
        "home_free_bytes": room(home),
        "memfd_fault": memfd(),
        "available_bytes": available(),
        "nofile_hard": hard,
        "interfaces": interfaces(),
        "rdma": rdma(),
        "ucx": ucx(),
        "gpus": gpus(),
        "listen_fault": unbound(asked["listen"]),
        "ports_taken": taken(asked["listen"], asked["ports"]),
        "models": {name: digest(path, os.path.join(home, "digests.json")) for name, path in models.items()},
        "wall_s": time.time(),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(looked(json.loads(sys.argv[1]))))
