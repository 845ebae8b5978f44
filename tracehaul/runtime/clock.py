"""The only module that reads time.

Under the simulator the running loop's clock is virtual, so code that asks here needs no change.
"""

import asyncio
import functools
import time  # noqa: TID251 - this is that module
from pathlib import Path


def now_s() -> float:
    """Monotonic seconds of the running event loop; comparable within one process only."""
    return asyncio.get_running_loop().time()


def perf_s() -> float:
    """Monotonic seconds for measuring work done in threads; always real time."""
    return time.perf_counter()


def wall_s() -> float:
    """Unix time: for logs and API timestamps, and where only it outlives a restart of the machine. It may be set."""
    return time.time()


def boot_s() -> float:
    """Seconds since the machine started, sleep included: never set, comparable between its processes. Real time."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@functools.cache
def boot_id() -> str:
    """Names this run of the machine; empty where it has no name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def wall_ns() -> int:
    """Unix time in nanoseconds: for names that none before has had."""
    return time.time_ns()
