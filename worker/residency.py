"""Which traces' KV is still on this worker while nobody computes on it. Pure.

Only idle sequences are here: a step takes one out and puts it back when it ends, so nothing that is computed on can
be evicted. Everything kept here is also in the store (or was refused by it), so an eviction costs a pull, or at worst
a recomputation.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tracehaul.engine.base import SequenceId
from tracehaul.wire.hashing import TOKEN_BYTES, common_prefix
from tracehaul.wire.ids import BlockHash, TraceId


@dataclass(frozen=True)
class Resident:
    """One idle sequence: the engine holds KV for exactly ``tokens`` (packed)."""

    sequence: SequenceId
    trace: TraceId
    salt: str
    tokens: bytes
    hashes: tuple[BlockHash, ...] = ()
    """Of the full blocks of ``tokens``."""

    @property
    def length(self) -> int:
        """Tokens held."""
        return len(self.tokens) // TOKEN_BYTES


class Residency:
    """Idle sequences, least recently used first; each may be worth its memory until a certain time."""

    def __init__(
        self,
        kept: Callable[[Resident], None] = lambda resident: None,
        removed: Callable[[Resident], None] = lambda resident: None,
    ) -> None:
        """``kept`` and ``removed`` are told of each sequence that becomes idle, and of each that is so no more."""
        self._kept = kept
        self._removed = removed
        self._idle: dict[SequenceId, Resident] = {}
        self._until_s: dict[SequenceId, float] = {}

    def __len__(self) -> int:
        return len(self._idle)

    @property
    def tokens(self) -> int:
        """Tokens of KV held by idle sequences."""
        return sum(resident.length for resident in self._idle.values())

    def keep(self, resident: Resident) -> None:
        """A step ended: its sequence is idle and the most recently used."""
        assert resident.sequence not in self._idle
        self._idle[resident.sequence] = resident
        self._kept(resident)

    def value(self, trace: TraceId, salt: str, until_s: float) -> int:
        """A trace's sequences are worth their memory until then; returns the length of the longest."""
        own = self._of(trace, salt)
        for resident in own:
            self._until_s[resident.sequence] = until_s
        return max((resident.length for resident in own), default=0)

    def all(self) -> list[Resident]:
        """Every one of them, the least recently used first."""
        return list(self._idle.values())

    def take_this(self, resident: Resident) -> bool:
        """Remove it; False: it is not here any more."""
        return self._idle.get(resident.sequence) is resident and self._remove(resident) is resident

    def take_own(self, trace: TraceId, salt: str, tokens: bytes) -> tuple[Resident, int] | None:
        """As :meth:`take`, of the trace's own only."""
        own = [(common_prefix(resident.tokens, tokens), resident) for resident in self._of(trace, salt)]
        if not own:
            return None
        shared, chosen = max(own, key=lambda one: one[0])
        return self._remove(chosen), shared

    def forget(self, trace: TraceId, salt: str) -> list[Resident]:
        """Remove and return a trace's sequences."""
        return [self._remove(resident) for resident in self._of(trace, salt)]

    def _of(self, trace: TraceId, salt: str) -> list[Resident]:
        return [resident for resident in self._idle.values() if (resident.trace, resident.salt) == (trace, salt)]

    def _remove(self, resident: Resident) -> Resident:
        self._until_s.pop(resident.sequence, None)
        self._removed(resident)
        return self._idle.pop(resident.sequence)

    def take(self, trace: TraceId, salt: str, tokens: bytes) -> tuple[Resident, int] | None:
        """Remove and return the best start for ``tokens``, with the length in tokens that both share.

        A trace's own sequence is taken whatever it shares, since the rest of it is of no more use. Another trace's is
        taken only if ``tokens`` continue all of it (a fork): cutting it short would cost that trace its context.
        """
        best: tuple[int, bool, int] | None = None
        chosen: Resident | None = None
        for recency, resident in enumerate(self._idle.values()):
            if resident.salt != salt:
                continue
            shared = common_prefix(resident.tokens, tokens)
            own = resident.trace == trace
            if shared == 0 or not (own or shared == resident.length):
                continue
            rank = (shared, own, recency)
            if best is None or rank > best:
                best, chosen = rank, resident
        if chosen is None or best is None:
            return None
        return self._remove(chosen), best[0]

    def evict(self, now_s: float, *, worthless: bool = False) -> Resident | None:
        """Remove and return the least recently used of those past their time, else of all; None if there is none.

        ``worthless``: only of those past their time.
        """
        least = next((r for r in self._idle.values() if self._until_s.get(r.sequence, now_s) <= now_s), None)
        if least is None and not worthless:
            least = next(iter(self._idle.values()), None)
        return None if least is None else self._remove(least)
