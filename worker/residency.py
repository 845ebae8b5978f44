"""Which traces' KV is still on this worker while nobody computes on it. Pure.

Only idle sequences are here: a step takes one out and puts it back when it ends, so nothing that is computed on can
be evicted. Everything kept here is also in the store (or was refused by it), so an eviction costs a pull, or at worst
a recomputation.
"""

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
    """Idle sequences, least recently used first."""

    def __init__(self) -> None:
        self._idle: dict[SequenceId, Resident] = {}

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
        del self._idle[chosen.sequence]
        return chosen, best[0]

    def evict(self) -> Resident | None:
        """Remove and return the least recently used one; None if there is none."""
        if not self._idle:
            return None
        return self._idle.pop(next(iter(self._idle)))
