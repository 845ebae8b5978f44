"""Bills add up to what the workers did: against a clock of our own on every engine."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from records.fakes import MemoryDocuments
from router.dispatch.bill_keeper import SHELF
from router.policy.bill_pages import Page, Report, report
from router.policy.prices import FREE
from sim.checker import Findings
from tracehaul.runtime import clock

SHARE_MAX = 0.01
"""Of what workers worked, what may be nobody's."""
ROUNDING = 1e-6
BEAT_S = 2.5
"""What a worker may have done since it was heard last."""


class Timed:
    """One worker's engine, and how long it was at work."""

    def __init__(self) -> None:
        self.began_s = clock.now_s()
        self.ended_s: float | None = None
        self.worked_s = 0.0
        self.unheard_s = 0.0
        """Before it died, with no router there to be told."""
        self._since_s: float | None = None

    def around(self, run: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        """The engine's ``run``, timed."""

        async def timed(work: Any) -> Any:
            self._since_s = clock.now_s()
            try:
                return await run(work)
            finally:
                self._stop()

        return timed

    def died(self, unheard_since_s: float | None) -> None:
        """Its process is no more; since then there was no router, if there is none."""
        self._stop()
        self.ended_s = clock.now_s()
        if unheard_since_s is not None:
            self.unheard_s = self.ended_s - max(self.began_s, unheard_since_s)

    def _stop(self) -> None:
        if self._since_s is not None and self.ended_s is None:
            self.worked_s += clock.now_s() - self._since_s
        self._since_s = None


async def told(documents: MemoryDocuments) -> Report:
    """All pages together."""
    kept = await documents.list(SHELF, {}, None, 10**9)
    return report(msgspec.msgpack.decode(document.body, type=Page) for document in kept)


class Sums(NamedTuple):
    """In seconds: by the engines' clock, and by what routers have written down."""

    worked: float
    there: float
    billed: float
    idle: float
    lost: float
    unclaimed: float

    @property
    def written(self) -> float:
        """Of all lines."""
        return self.billed + self.idle + self.lost + self.unclaimed


async def sums(documents: MemoryDocuments, engines: Sequence[Timed]) -> Sums:
    """As of now."""
    found = await told(documents)
    fleet = {line.what: line.seconds for line in found.fleet}
    return Sums(
        sum(engine.worked_s for engine in engines),
        sum((engine.ended_s or clock.now_s()) - engine.began_s for engine in engines),
        sum((row.bill for row in found.rows), FREE).spent.worker_s,
        **fleet,
    )


async def check_bills(findings: Findings, documents: MemoryDocuments, engines: Sequence[Timed]) -> Sums:
    """Nothing was billed that no engine did, nothing twice, and all that they did and told."""
    found = await sums(documents, engines)
    if found.billed > found.worked * (1 + ROUNDING):
        findings.add("bills", f"{found.billed:.6f} s are billed, and engines worked {found.worked:.6f} s")
    if abs(found.unclaimed) > SHARE_MAX * found.worked:
        findings.add("bills", f"{found.unclaimed:.6f} s of {found.worked:.6f} s of work are nobody's")
    if found.written < found.there - sum(BEAT_S + engine.unheard_s for engine in engines):
        what = f"workers were there for {found.there:.1f} s, and bills know of {found.written:.1f} s"
        findings.add("bills", what)
    return found
