"""What is kept of a batch's lines: who asks them, and what they were answered."""

from collections.abc import Container
from typing import Protocol

from jobs.leases import Held, Leases, Taken


class Ledger(Protocol):
    """Of one batch. Once :meth:`end` has returned, its line is kept, whatever dies.

    Everything raises OSError where it cannot be kept now; then nothing has changed.
    """

    @property
    def ended(self) -> Container[int]:
        """The lines that are known to have."""
        ...

    async def claim(self, line: int, now_s: float, until_s: float) -> Held | Taken:
        """See :meth:`jobs.leases.Leases.claim`."""
        ...

    async def renew(self, line: int, fence: int, until_s: float) -> bool:
        """See :meth:`jobs.leases.Leases.renew`."""
        ...

    async def put_back(self, line: int, fence: int) -> bool:
        """See :meth:`jobs.leases.Leases.put_back`."""
        ...

    async def end(self, line: int, fence: int, said: bytes, *, ok: bool) -> bool:
        """It ended with this result, a line with its newline. False: another's counts, and this one is not kept."""
        ...


class MemoryLedger:
    """Keeps nothing beyond this process: for tests."""

    def __init__(self) -> None:
        self._leases = Leases()
        self.results: list[tuple[int, bytes, bool]] = []
        """In the order of their ends."""

    @property
    def ended(self) -> Container[int]:
        return frozenset(self._leases.ended)

    async def claim(self, line: int, now_s: float, until_s: float) -> Held | Taken:
        return self._leases.claim(line, now_s, until_s)

    async def renew(self, line: int, fence: int, until_s: float) -> bool:
        return self._leases.renew(line, fence, until_s)

    async def put_back(self, line: int, fence: int) -> bool:
        return self._leases.put_back(line, fence)

    async def end(self, line: int, fence: int, said: bytes, *, ok: bool) -> bool:
        if not self._leases.end(line, fence):
            return False
        self.results.append((line, said, ok))
        return True
