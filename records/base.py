"""What is asked of a durable store: :class:`Records`. It has one contract suite, whatever keeps the rows."""

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol


class TraceName(NamedTuple):
    """Whose rows."""

    tenant: str
    trace: str


class TraceRow(NamedTuple):
    """One change of a trace."""

    tenant: str
    trace: str
    number: int
    """Rises from change to change, over all traces of a router."""
    version: int
    """Of the body's form."""
    body: bytes


class Batch(NamedTuple):
    """What is written at once, or not at all."""

    rows: Sequence[TraceRow] = ()
    superseded: Sequence[tuple[TraceName, int]] = ()
    """Traces of which only rows from that number on are kept."""
    erased: Sequence[TraceName] = ()
    """Traces of which nothing is kept; before the rows are written."""


class RecordsLost(Exception):
    """The store cannot be asked, or does not do what it is asked: it is full, read-only, away, or too slow."""


class Records(Protocol):
    """The rows of one router. Of one event loop; one caller at a time."""

    async def write(self, batch: Batch) -> None:
        """It is durable on return. What was written in vain may be written again.

        Raises:
            RecordsLost: nobody knows whether it was written.
        """
        ...

    def rows(self) -> AsyncIterator[Sequence[TraceRow]]:
        """All of them, by number, some at a time.

        Raises:
            RecordsLost: it cannot be read, or not on.
        """
        ...

    async def close(self) -> None:
        """Let go of it."""
        ...
