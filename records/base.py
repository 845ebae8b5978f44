"""What is asked of a durable store: :class:`Records`. It has one contract suite, whatever keeps the rows.

Several routers may share the rows. Each trace has one writer: who takes it over raises its **fence**, and what a writer
of before still writes under a lower one is not written.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
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
    """Rises from change to change of the trace."""
    version: int
    """Of the body's form."""
    body: bytes


class Claim(NamedTuple):
    """A trace that a writer has taken."""

    tenant: str
    trace: str
    fence: int
    """0: it is new, and nobody has."""


class Marks(NamedTuple):
    """By what a trace is found that is not named."""

    tip: bytes = b""
    """The digest of its last conversation."""
    answers: tuple[str, str] = ("", "")
    """Its last answer, as a response that calls may name, and as what they are recognised by."""


class Holder(NamedTuple):
    """Who has a trace."""

    tenant: str
    trace: str
    router: str
    address: str
    """``host:port`` of its control plane."""
    lives: bool
    """As far as anybody knows."""


class Batch(NamedTuple):
    """What is written at once, or not at all, but for traces that were lost to another writer."""

    rows: Sequence[TraceRow] = ()
    claims: Sequence[tuple[Claim, Marks]] = ()
    """Of each trace that has rows."""
    superseded: Sequence[tuple[TraceName, int]] = ()
    """Traces of which only rows from that number on are kept."""
    erased: Sequence[Claim] = ()
    """Traces of which nothing is kept; before the rows are written."""


class RecordsLost(Exception):
    """The store cannot be asked, or does not do what it is asked: it is full, read-only, away, or too slow."""


class Records(Protocol):
    """The rows as one life of one router has them. Of one event loop; one caller at a time. Every method but
    ``close`` raises RecordsLost: nobody knows whether it was done, and it may be asked again."""

    async def write(self, batch: Batch) -> frozenset[TraceName]:
        """It is durable on return; returns the traces that have another writer by now, of which nothing was done.
        A new trace has its writer under fence 1 then."""
        ...

    async def adopt(self, *, others: bool, all_mine: bool) -> list[Claim]:
        """Take over what former lives of this router had, and with ``others`` what routers had that live no more;
        returns these. With ``all_mine`` all that this life has: where an answer was lost."""
        ...

    async def claim(self, name: TraceName) -> Claim | None:
        """Take one over, whoever has it; None: there is no such trace."""
        ...

    async def holder(self, tenant: str, name: str, tips: Sequence[bytes] = (), answer: str = "") -> Holder | None:
        """Who has the trace of that name, or else the one whose last conversation is the last of ``tips`` that any is,
        or whose last answer that is; None: nobody."""
        ...

    async def live(self, for_s: float) -> Mapping[str, str]:
        """This router lives, and the others may believe that for so long; 0: it ends. Returns those that live beside
        it, by name, with the addresses of their control planes."""
        ...

    def rows(self, names: Sequence[TraceName]) -> AsyncIterator[Sequence[TraceRow]]:
        """Those of these traces, some at a time: one trace after the other, by number."""
        ...

    async def erase(self, tenant: str) -> int:
        """Nothing is kept of a tenant's traces, whoever has them; returns how many these were."""
        ...

    async def close(self) -> None:
        """Let go of it."""
        ...
