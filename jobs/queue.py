"""Which line of which batch comes next: earliest deadline first, and what begins alike together. Pure."""

import heapq
from array import array
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Container, Sequence

import msgspec

from jobs.cap import Left


class Claim(msgspec.Struct, frozen=True):
    """One line to be asked. Until :meth:`Queue.over` or :meth:`Queue.later` nothing of its chain is claimed."""

    batch: str
    line: int
    chain: int
    deadline_s: float


class _Batch:
    """The lines of one batch that wait."""

    def __init__(
        self, deadline_s: float, chains: Sequence[Sequence[int]], ended: Container[int], *, presses: bool
    ) -> None:
        self.deadline_s = deadline_s
        self.presses = presses
        self.left = sum(line not in ended for chain in chains for line in chain)
        """Lines that have not ended."""
        self._chains = chains
        self._ended = ended
        self._at = array("L", bytes(array("L").itemsize * len(chains)))
        """How far each chain is."""
        self._fresh = 0
        """Chains from here on have not begun."""
        self._ready: deque[int] = deque()
        """Chains that have, whose next line can be asked."""
        self._later: list[tuple[float, int]] = []
        """A heap of those that can at that time."""
        self.claimed = 0

    def next(self, now_s: float) -> tuple[int, int] | None:
        """A chain and its line."""
        while self._later and self._later[0][0] <= now_s:
            self._ready.append(heapq.heappop(self._later)[1])
        while self._ready:
            if (line := self._line(chain := self._ready.popleft())) is not None:
                return chain, line
        while self._fresh < len(self._chains):
            chain = self._fresh
            self._fresh += 1
            if (line := self._line(chain)) is not None:
                return chain, line
        return None

    def _line(self, chain: int) -> int | None:
        """The next one of it that has not ended."""
        lines = self._chains[chain]
        while self._at[chain] < len(lines):
            line = lines[self._at[chain]]
            if line not in self._ended:
                return line
            self._at[chain] += 1
        return None

    def over(self, chain: int) -> None:
        """Its line has ended; the next step comes at once, while its context is where it is."""
        self.left -= 1
        self._at[chain] += 1
        self._ready.appendleft(chain)

    def later(self, chain: int, at_s: float) -> None:
        """Its line is asked again then."""
        heapq.heappush(self._later, (at_s, chain))

    @property
    def wake_s(self) -> float | None:
        """When the next of those that wait can be asked."""
        return self._later[0][0] if self._later else None

    @property
    def drained(self) -> bool:
        """Nothing waits, and nothing is claimed."""
        if self.claimed or self._later:
            return False
        while self._ready and self._line(self._ready[0]) is None:
            self._ready.popleft()
        while not self._ready and self._fresh < len(self._chains) and self._line(self._fresh) is None:
            self._fresh += 1
        return not self._ready and self._fresh == len(self._chains)


class Queue:
    """All batches of one runner. Times are of any one clock.

    A look costs what could be claimed now, and not what waits: there may be a hundred thousand batches of one line.
    """

    def __init__(self) -> None:
        self._batches: dict[str, _Batch] = {}
        self._order: list[tuple[float, str]] = []
        """The earliest deadline first; without those of which everything is claimed that could be."""
        self._pressing: list[tuple[float, str]] = []
        """Those that press, likewise, all of them."""
        self._resting: set[str] = set()
        """Those that are not in the order."""
        self._later: list[tuple[float, str]] = []
        """A heap of when a line of which is asked again; also of batches that are no more."""

    def __contains__(self, batch: str) -> bool:
        return batch in self._batches

    def add(
        self,
        batch: str,
        deadline_s: float,
        chains: Sequence[Sequence[int]],
        ended: Container[int] = (),
        *,
        presses: bool = True,
    ) -> None:
        """Its lines wait from now on.

        Args:
            batch: a name that is not there yet.
            deadline_s: when it must be over.
            chains: its lines: those of a chain are asked one after the other, chains beside each other in this order.
            ended: lines that are not asked; looked at when their turn comes.
            presses: it is to be over by then, whatever else runs.
        """
        assert batch not in self._batches
        self._batches[batch] = _Batch(deadline_s, chains, ended, presses=presses)
        insort(self._order, (deadline_s, batch))
        if presses:
            insort(self._pressing, (deadline_s, batch))

    def drop(self, batch: str) -> None:
        """Nothing more of it is claimed; what is, may be told over or later, or not."""
        if (found := self._batches.pop(batch, None)) is None:
            return
        if batch in self._resting:
            self._resting.remove(batch)
        else:
            _remove(self._order, (found.deadline_s, batch))
        if found.presses:
            _remove(self._pressing, (found.deadline_s, batch))

    def left(self, now_s: float) -> list[Left]:
        """Of those that press, the earliest deadline first."""
        batches = [self._batches[name] for _, name in self._pressing]
        return [Left(batch.left, batch.deadline_s - now_s) for batch in batches if batch.left]

    def claim(self, now_s: float) -> Claim | None:
        """The line to be asked now; None: there is none now."""
        self._come_again(now_s)
        at = bisect_right(self._order, now_s, key=lambda entry: entry[0])  # what is late is not asked
        while at < len(self._order):
            _, name = self._order[at]
            batch = self._batches[name]
            if (found := batch.next(now_s)) is not None:
                batch.claimed += 1
                return Claim(name, found[1], found[0], batch.deadline_s)
            del self._order[at]
            self._resting.add(name)
        return None

    def over(self, claim: Claim) -> None:
        """The line has ended, here or elsewhere."""
        if (batch := self._batches.get(claim.batch)) is not None:
            batch.claimed -= 1
            batch.over(claim.chain)
            self._rises(claim.batch, batch)

    def later(self, claim: Claim, at_s: float) -> None:
        """It is asked again then."""
        if (batch := self._batches.get(claim.batch)) is not None:
            batch.claimed -= 1
            batch.later(claim.chain, at_s)
            heapq.heappush(self._later, (at_s, claim.batch))

    def drained(self, batch: str) -> bool:
        """All its lines have ended."""
        found = self._batches.get(batch)
        return found is None or found.drained

    def wake_s(self, now_s: float) -> float | None:
        """When to look again though nothing happens; None: then there is nothing to see."""
        while self._later:
            at_s, name = self._later[0]
            if (batch := self._batches.get(name)) is not None and batch.deadline_s > now_s:
                return at_s
            heapq.heappop(self._later)
        return None

    def _come_again(self, now_s: float) -> None:
        """Into the order, whose line can be asked again by now."""
        while self._later and self._later[0][0] <= now_s:
            _, name = heapq.heappop(self._later)
            if (batch := self._batches.get(name)) is not None:
                self._rises(name, batch)

    def _rises(self, name: str, batch: _Batch) -> None:
        if name in self._resting:
            self._resting.remove(name)
            insort(self._order, (batch.deadline_s, name))


def _remove(order: list[tuple[float, str]], entry: tuple[float, str]) -> None:
    del order[bisect_left(order, entry)]
