"""What copying costs without a store: one thread, memory of the same kind, never in a cache."""

import numpy as np

from tracehaul.runtime import clock
from tracehaul.transfer.memory import allocate


class Copier:
    """Copies from ``source`` into as much memory of its own."""

    def __init__(self, source: memoryview) -> None:
        self._memory = allocate(source.nbytes, "memcpy")
        self._source = np.frombuffer(source, dtype=np.uint8)
        self._target = np.frombuffer(self._memory.buffer, dtype=np.uint8)

    def copy(self, batch: int, batch_bytes: int, size: int) -> tuple[float, float]:
        """Copy one batch block by block; when it began and ended."""
        source, target = self._source, self._target
        start_s = clock.perf_s()
        for at in range(batch * batch_bytes, (batch + 1) * batch_bytes, size):
            np.copyto(target[at : at + size], source[at : at + size])
        return start_s, clock.perf_s()
