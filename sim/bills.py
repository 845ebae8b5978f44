"""Bills add up to what the workers did: against a clock of our own on every engine."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from records.fakes import MemoryDocuments
from router.dispatch.bill_keeper import SHELF
from router.policy.bill_pages import Page, Report, report
from router.policy.prices import FREE
from sim.checker import Findings
from tracehaul.runtime import clock

SHARE_MAX = 0.01
"""Of the workers' time, what may be no trace's, nor idle, nor lost with a worker; and of their work what may be billed
twice: of steps that ended just before their router did, which nobody has written down."""
BEAT_S = 2.5
"""What a worker may have done since it was heard last."""


class Timed:
    """One worker's engine, and how long it was at work."""

    def __init__(self) -> None:
        self.began_s = clock.now_s()
        self.ended_s: float | None = None
        self.worked_s = 0.0
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

    def died(self) -> None:
        """Its process is no more."""
        self._stop()
        self.ended_s = clock.now_s()

    def _stop(self) -> None:
        if self._since_s is not None and self.ended_s is None:
            self.worked_s += clock.now_s() - self._since_s
        self._since_s = None


async def told(documents: MemoryDocuments) -> Report:
    """All pages together."""
    kept = await documents.list(SHELF, {}, None, 10**9)
    return report(msgspec.msgpack.decode(document.body, type=Page) for document in kept)


async def check_bills(findings: Findings, documents: MemoryDocuments, engines: Sequence[Timed]) -> None:
    """Nothing was billed that no engine did, nothing twice, and nearly all that they did."""
    found = await told(documents)
    billed_s = sum((row.bill for row in found.rows), FREE).spent.worker_s
    worked_s = sum(engine.worked_s for engine in engines)
    there_s = sum((engine.ended_s or clock.now_s()) - engine.began_s for engine in engines)
    unclaimed = next(line.seconds for line in found.fleet if line.what == "unclaimed")
    if billed_s > worked_s * (1 + SHARE_MAX):
        findings.add("bills", f"{billed_s:.6f} s are billed, and engines worked {worked_s:.6f} s")
    if abs(unclaimed) > SHARE_MAX * there_s:
        what = f"{unclaimed:.6f} s of {worked_s:.6f} s of work are nobody's"
        findings.add("bills", f"{what}, of workers that were there for {there_s:.1f} s")
    heard_s = found.total.seconds
    if heard_s < there_s - BEAT_S * len(engines):
        findings.add("bills", f"workers were there for {there_s:.1f} s, and bills know of {heard_s:.1f} s")
