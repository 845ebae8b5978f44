"""The only module that reads time.

Under the simulator the running loop's clock is virtual, so code that asks here needs no change.
"""

import asyncio
import time  # noqa: TID251 - this is that module


def now_s() -> float:
    """Monotonic seconds of the running event loop; comparable within one process only."""
    return asyncio.get_running_loop().time()


def perf_s() -> float:
    """Monotonic seconds for measuring work done in threads; always real time."""
    return time.perf_counter()


def wall_s() -> float:
    """Unix time: for logs and API timestamps, never for decisions."""
    return time.time()


def wall_ns() -> int:
    """Unix time in nanoseconds: a node's generation at start."""
    return time.time_ns()
