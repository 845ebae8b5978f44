"""Rows in memory that outlive whoever writes them: for tests, and for a simulated cluster."""

from collections.abc import AsyncIterator, Sequence

from records.base import Batch, RecordsLost, TraceName, TraceRow


class MemoryRecords:
    """Implements :class:`records.base.Records`."""

    def __init__(self) -> None:
        self.kept: dict[int, TraceRow] = {}
        self.lost: str | None = None
        """Why nothing can be asked of it; None: it can."""

    async def write(self, batch: Batch) -> None:
        self._check()
        erased = set(batch.erased)
        kept = {number: row for number, row in self.kept.items() if TraceName(row.tenant, row.trace) not in erased}
        for row in batch.rows:
            assert row.number not in kept, f"a number is written twice: {row.number}"
            kept[row.number] = row
        first = dict(batch.superseded)
        self.kept = {
            number: row for number, row in kept.items() if number >= first.get(TraceName(row.tenant, row.trace), 0)
        }

    async def rows(self) -> AsyncIterator[Sequence[TraceRow]]:
        self._check()
        for number in sorted(self.kept):
            yield [self.kept[number]]

    async def close(self) -> None:
        pass

    def _check(self) -> None:
        if self.lost is not None:
            raise RecordsLost(self.lost)
