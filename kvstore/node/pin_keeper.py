"""Between an arena's pins and the journal that keeps them over a restart."""

from collections.abc import Sequence

from kvstore.index.arena import Arena
from kvstore.index.pin_records import EndEntry, Moment, PinEntry, pack_hashes
from kvstore.index.pins import HARD, HeldPin, PinKey
from kvstore.node.pin_journal import PinJournal
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log

log = Log(__name__)


class PinKeeper:
    """Brings an arena the pins of its former life, and writes down those of this one."""

    def __init__(self, arena: Arena, journal: PinJournal, half_life_s: float) -> None:
        self.journal = journal
        self._arena = arena
        self._half_life_s = half_life_s
        now_s = clock.now_s()
        kept = journal.recover(half_life_s)
        refusals = [refusal for pin in kept if (refusal := arena.repin(pin, now_s)) is not None]
        if refusals:
            log.warning("pins of the node's former life are beyond its limits now", pins=len(refusals), why=refusals[0])
        if kept:
            log.info("pins are in force again", pins=len(kept) - len(refusals))
        journal.follow(self._snapshot)

    async def keep(self, key: PinKey) -> None:
        """Return when the journal has a trace's pin as it is now, or that there is none.

        Raises:
            Unavailable: it could not be written.
        """
        held = self._arena.pin_of(key)
        entry = EndEntry(*key) if held is None else self._entry(key, held, clock.now_s(), self.journal.moment())
        await self.journal.write(entry)

    def _snapshot(self) -> Sequence[PinEntry]:
        now_s, at = clock.now_s(), self.journal.moment()
        return [self._entry(key, held, now_s, at) for key, held in self._arena.open_pins(now_s)]

    def _entry(self, key: PinKey, held: HeldPin, now_s: float, at: Moment) -> PinEntry:
        octaves = 0.0 if held.rank == HARD else held.rank - now_s / self._half_life_s
        tenant, trace = key
        remaining_s, hashes = held.until_s - now_s, pack_hashes(held.hashes)
        return PinEntry(tenant, trace, held.kind, octaves, remaining_s, at, hashes, held.replicas)
