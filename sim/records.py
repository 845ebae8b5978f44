"""The database that simulated routers share: it is slow, fails, stalls, does things and does not say so, by seed.

What it keeps outlives every router, and says nothing untrue: a real one's transactions do the same.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Literal, NamedTuple

from records.base import Batch, Claim, Holder, RecordsLost, TraceName, TraceRow
from records.fakes import MemoryRecords, MemoryTables
from router.traces.changes import Read, read
from router.traces.machine import Traces
from router.traces.packing import unpacked
from router.traces.trace import TraceKey
from tracehaul.runtime import clock
from tracehaul.wire.ids import TraceId

Trouble = Literal["fails", "stalls", "unsure"]
"""Nothing is done; nothing is answered; it is done, and half of the answers are lost."""

TIMEOUT_S = 10.0
QUIET_S = 3.0
"""At the beginning."""
LATENCY_S = 0.004


def written(tables: MemoryTables) -> dict[TraceKey, Read]:
    """What a next life would know of each trace now."""
    found: dict[TraceKey, Read] = {}
    for name, number in sorted(tables.kept):
        row, key = tables.kept[name, number], (name.tenant, TraceId(name.trace))
        found[key] = read(key, found.get(key), number, unpacked(row.version, row.body))
    return found


def ended_unwritten(tables: MemoryTables, traces: Traces) -> set[TraceId]:
    """Those that have ended, which nobody will know when their router dies now."""
    told = written(tables)
    return {key[1] for key in told if not told[key].trace.ended and (known := traces.get(key)) and known.ended}


class Window(NamedTuple):
    """When something is wrong."""

    from_s: float
    until_s: float
    kind: Trouble


def make_windows(seed: int, end_s: float) -> list[Window]:
    """Of one run: none in every fourth."""
    rng = random.Random(f"records {seed}")  # noqa: S311 - reproducible is the point
    windows: list[Window] = []
    at_s = QUIET_S
    while seed % 4 and at_s < end_s:
        at_s += rng.uniform(0.0, 8.0)
        length_s = rng.choice([0.3, 2.0, 8.0])
        if at_s < end_s:
            kinds: list[Trouble] = ["fails", "stalls", "unsure"]
            windows.append(Window(at_s, min(end_s, at_s + length_s), rng.choice(kinds)))
        at_s += length_s
    return windows


class Database:
    """One for all routers of a run."""

    def __init__(self, seed: int, end_s: float) -> None:
        self.tables = MemoryTables()
        self.failed = 0
        """Times that something was wrong."""
        self._windows = make_windows(seed, end_s)
        self._dice = random.Random(f"records {seed} calls")  # noqa: S311

    @property
    def calm(self) -> bool:
        """Nothing is ever wrong in this run."""
        return not self._windows

    def trouble(self) -> Window | None:
        """What is wrong now."""
        now_s = clock.now_s()
        return next((window for window in self._windows if window.from_s <= now_s < window.until_s), None)

    async def asked(self) -> bool:
        """On the way there; returns whether the answer will be lost. Raises RecordsLost."""
        await asyncio.sleep(self._dice.expovariate(1 / LATENCY_S))
        window = self.trouble()
        if window is None:
            return False
        if window.kind == "unsure":
            return self._dice.random() < 0.5
        self.failed += 1
        if window.kind == "stalls":
            wait_s = window.until_s - clock.now_s()
            await asyncio.sleep(min(wait_s, TIMEOUT_S))
            if wait_s <= TIMEOUT_S:
                return False
        raise RecordsLost(f"the database {window.kind}")

    async def answered(self, lost: bool) -> None:
        """On the way back. Raises RecordsLost."""
        await asyncio.sleep(self._dice.expovariate(1 / LATENCY_S))
        if lost:
            self.failed += 1
            raise RecordsLost("it does not answer in time")


class SimRecords:
    """Implements :class:`records.base.Records`: one life of one router at the database."""

    def __init__(self, database: Database, router: str, life: str, address: str) -> None:
        self._database = database
        self._inner = MemoryRecords(database.tables, router, life, address)

    async def write(self, batch: Batch) -> frozenset[TraceName]:
        lost = await self._database.asked()
        done = await self._inner.write(batch)
        await self._database.answered(lost)
        return done

    async def adopt(self, *, others: bool, all_mine: bool) -> list[Claim]:
        lost = await self._database.asked()
        found = await self._inner.adopt(others=others, all_mine=all_mine)
        await self._database.answered(lost)
        return found

    async def claim(self, name: TraceName) -> Claim | None:
        lost = await self._database.asked()
        found = await self._inner.claim(name)
        await self._database.answered(lost)
        return found

    async def holder(self, tenant: str, name: str, tips: Sequence[bytes] = (), answer: str = "") -> Holder | None:
        lost = await self._database.asked()
        found = await self._inner.holder(tenant, name, tips, answer)
        await self._database.answered(lost)
        return found

    async def live(self, for_s: float) -> Mapping[str, str]:
        lost = await self._database.asked()
        found = await self._inner.live(for_s)
        await self._database.answered(lost)
        return found

    async def rows(self, names: Sequence[TraceName]) -> AsyncIterator[Sequence[TraceRow]]:
        async for rows in self._inner.rows(names):
            await self._database.answered(await self._database.asked())
            yield rows

    async def erase(self, tenant: str) -> int:
        lost = await self._database.asked()
        found = await self._inner.erase(tenant)
        await self._database.answered(lost)
        return found

    async def close(self) -> None:
        pass
