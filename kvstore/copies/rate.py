"""How fast copies may be made in the background."""

import asyncio

from tracehaul.runtime import clock


class Rate:
    """Bytes per second, shared by all who :meth:`take` from it; what was not used is not saved up."""

    def __init__(self, bytes_s: float) -> None:
        assert bytes_s > 0
        self._bytes_s = bytes_s
        self._free_s = 0.0

    async def take(self, nbytes: int) -> None:
        """Wait for one's turn; the bytes may be moved then."""
        now_s = clock.now_s()
        at_s = max(self._free_s, now_s)
        self._free_s = at_s + nbytes / self._bytes_s
        if at_s > now_s:
            await asyncio.sleep(at_s - now_s)
