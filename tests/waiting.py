"""Waiting for what other processes and threads do."""

import threading
from collections.abc import Callable

from tracehaul.runtime import clock


def wait_until(holds: Callable[[], bool], within_s: float = 60.0) -> float:
    """Until it holds; how long that took. Raises AssertionError if it does not come to hold in time."""
    began_s = clock.perf_s()
    pause = threading.Event()
    while not holds():
        assert clock.perf_s() - began_s < within_s, "it did not come to hold in time"
        pause.wait(0.01)
    return clock.perf_s() - began_s
