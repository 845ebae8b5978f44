"""What was run on a server lately, by trace: much of it is still in its memory. Pure."""

from collections import OrderedDict

from tracehaul.wire.hashing import common_prefix
from tracehaul.wire.ids import TraceId

BYTES_MAX = 64 * 2**20
"""Four for each token."""


class Ran:
    """A guess, as the server tells nobody what it evicts."""

    def __init__(self, bytes_max: int = BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._nbytes = 0
        self._last: OrderedDict[tuple[str, TraceId], bytes] = OrderedDict()

    def add(self, salt: str, trace: TraceId, packed: bytes) -> None:
        """A step of that trace has ended, whose sequence was this."""
        self.forget(salt, trace)
        self._last[salt, trace] = packed
        self._nbytes += len(packed)
        while self._nbytes > self._bytes_max:
            self._nbytes -= len(self._last.popitem(last=False)[1])

    def shared(self, salt: str, trace: TraceId, packed: bytes) -> int:
        """How many tokens that sequence begins with that the trace's last one began with, too."""
        last = self._last.get((salt, trace))
        return 0 if last is None else common_prefix(last, packed)

    def forget(self, salt: str, trace: TraceId) -> None:
        """Its server has lost it, or the trace has ended."""
        self._nbytes -= len(self._last.pop((salt, trace), b""))

    def clear(self) -> None:
        """The server has lost everything."""
        self._last.clear()
        self._nbytes = 0
