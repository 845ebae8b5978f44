"""What a store of records has of each trace, and what is to be written next. Pure."""

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

import msgspec

from records.base import Claim, Marks, TraceName, TraceRow
from router.traces.changes import Clock, Planned, written
from router.traces.packing import VERSION
from router.traces.trace import Trace, TraceKey
from tracehaul.wire.ids import TraceId

CHANGES_FEW, CHANGES_MAX = 16, 128
"""A trace is written whole again after the first number of changes if they take as much as it did, else after the
second."""
SWEEP_S = 600.0
EXPIRED_MAX = 32
"""Traces that are erased at once at most because they have rested too long."""


class TraceJournalStats(msgspec.Struct):
    """Counters of the router's life, for metrics."""

    batches: int = 0
    changes: int = 0
    bytes_written: int = 0
    whole: int = 0
    failures: int = 0
    restored: int = 0
    unreadable: int = 0
    lost: int = 0
    """To another router, that had taken them over."""


@dataclass
class Stored:
    """What the store has of a trace."""

    trace: Trace | None
    """As it was written; None: it is to be written whole."""
    number: int
    """Of its last change."""
    at_s: float
    fence: int = 0
    """Under which it is written; 0: nothing of it was yet."""
    whole_bytes: int = 0
    """Before packing; the next one, too."""
    since_bytes: int = 0
    count: int = 0

    @property
    def full(self) -> bool:
        """It is time to write it whole."""
        return self.count >= CHANGES_MAX or (self.count >= CHANGES_FEW and self.since_bytes >= self.whole_bytes)


class Ledger:
    """Of one router's traces.

    Args:
        keep_s: what has rested for longer is erased.
        editions: as of :class:`router.dispatch.journal.Journal`.
    """

    def __init__(self, keep_s: float, editions: Mapping[str, str]) -> None:
        self.stored: dict[TraceKey, Stored] = {}
        self.foreign: set[TraceKey] = set()
        """Traces that are known here as far as they were when they were read: others write them."""
        self.whole = 0
        """How many were written whole."""
        self._keep_s = keep_s
        self._editions = editions
        self._swept_s = 0.0

    def row(self, trace: Trace, planned: Planned, now: Clock) -> tuple[TraceRow, tuple[Claim, Marks], int]:
        """A trace's next one, with its claim; and from which of its rows on they are needed (0: all)."""
        key = trace.key
        stored = self.stored.get(key)
        before = stored.trace if stored is not None and not stored.full else None
        follows = stored.number if stored is not None and before is not None else 0
        fence, number = (stored.fence, stored.number + 1) if stored is not None else (0, 1)
        body = written(before, follows, trace, planned, now, self._editions)
        if stored is None or before is None:
            self.stored[key] = Stored(trace, number, now.now_s, fence, len(body))
            self.whole += 1
        else:
            stored.trace, stored.number, stored.at_s = trace, number, now.now_s
            stored.since_bytes += len(body)
            stored.count += 1
        first = number if number > 1 and not follows else 0
        return TraceRow(key[0], key[1], number, VERSION, body), (Claim(key[0], key[1], fence), _marks(trace)), first

    def gone(self, keys: Iterable[TraceKey]) -> list[Claim]:
        """Claims of those that are to be erased."""
        return [Claim(*key, max(1, self.stored[key].fence)) for key in keys]

    def wrote(self, keys: Iterable[TraceKey]) -> None:
        """They are there now."""
        for key in keys:
            if (stored := self.stored.get(key)) is not None:
                stored.fence = max(1, stored.fence)

    def lost(self, away: Container[TraceName], claims: Iterable[tuple[Claim, Marks]]) -> list[TraceKey]:
        """Those of what was to be written under these claims that are another writer's, and not this one's again since
        then."""
        found = [((one.tenant, TraceId(one.trace)), one) for one, _ in claims]
        return [key for key, one in found if TraceName(*key) in away and self.fence(key) <= max(1, one.fence)]

    def fence(self, key: TraceKey) -> int:
        """Under which a trace is written; 0: it is not."""
        return self.stored[key].fence if key in self.stored else 0

    def under(self, key: TraceKey) -> int | None:
        """Under which a trace was written here; 0: by whoever has it by now; None: it is new."""
        return 0 if key in self.foreign else self.fence(key) or None

    def known(self) -> dict[TraceKey, int]:
        """What is written here as far as is known, and under which fences."""
        return {key: stored.fence for key, stored in self.stored.items() if stored.fence}

    def unsure(self, keys: Iterable[TraceKey]) -> None:
        """Nobody knows what the store has of them."""
        for key in keys:
            if (stored := self.stored.get(key)) is not None:
                stored.trace = None

    def forget(self, tenant: str) -> None:
        """Nothing is there of a tenant's."""
        self.stored = {key: stored for key, stored in self.stored.items() if key[0] != tenant}

    # --- what rests -----------------------------------------------------------------------------------------------

    def sweeps_s(self, now_s: float) -> float:
        """In how many seconds it is time to look for what has rested too long."""
        return max(0.0, self._swept_s + SWEEP_S - now_s)

    def swept(self, at_s: float = -math.inf) -> None:
        """That was done then; or is to be done anew."""
        self._swept_s = at_s

    def expired(self, now_s: float, changed: Container[TraceKey]) -> list[TraceKey]:
        """Of what nothing is to be kept any more, although it is known: some, none of it changed."""
        if self.sweeps_s(now_s):
            return []
        old = (key for key, stored in self.stored.items() if now_s - stored.at_s > self._keep_s and key not in changed)
        found = list(islice(old, EXPIRED_MAX))
        if len(found) < EXPIRED_MAX:
            self._swept_s = now_s
        return found


def _marks(trace: Trace) -> Marks:
    last = trace.responses[-2:]
    return Marks(trace.tip or b"", (last[0] if last else "", last[-1] if last else ""))


def names(claims: Iterable[Claim]) -> list[TraceName]:
    """Whose they are."""
    return [TraceName(claim.tenant, claim.trace) for claim in claims]
