"""Runs a stock server with all that it starts, and leaves none of it behind: not when it is told to end, not when the
server dies, not when its own parent is killed. Needs nothing but the standard library.

``python -m engines.adapter.server_keeper GRACE_S COMMAND...`` leads a process group, which is what it keeps.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1


def die_with_parent(number: int) -> None:
    """The kernel sends this process ``number`` when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def others(group: int) -> list[int]:
    """Processes of that group but for this one."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if os.getpgid(int(entry.name)) == group:
                    found.append(int(entry.name))
    return found


def send(group: int, number: int) -> None:
    """To all of the group but this one."""
    for pid in others(group):
        with contextlib.suppress(OSError):
            os.kill(pid, number)


def main(grace_s: float, command: list[str]) -> int:
    """The server's exit code."""
    parent = os.getppid()
    die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:  # it ended before that was asked for
        return 1
    group = os.getpgrp()
    told = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        send(group, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    # No thread runs here, so that what follows the fork is safe.
    server = subprocess.Popen(command, preexec_fn=lambda: die_with_parent(signal.SIGKILL))  # noqa: PLW1509
    try:
        while not told:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.2)
                break
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(grace_s)
    finally:
        send(group, signal.SIGKILL)
    return server.wait()


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
