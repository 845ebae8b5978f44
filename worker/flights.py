"""Steps that need the same blocks compute them once: the first does, the others wait for it to publish them."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager

from tracehaul.runtime.deadline import until
from tracehaul.wire.ids import BlockHash
from worker.context import Context

UNPUBLISHED_MAX_S = 5.0
"""How long another step may publish nothing before its work is not waited for: its caller may be frozen."""


class Flight:
    """One step's computation, as others that need the same blocks see it."""

    def __init__(self, *, background: bool) -> None:
        self.background = background
        """Others than the background's do not wait for it: they would wait for their own end."""
        self._published_tokens = 0
        self._ended = False
        self._changed = asyncio.Event()

    def published(self, tokens: int) -> None:
        """That many leading tokens can be pulled from the store now."""
        self._published_tokens = tokens
        self._changed.set()

    def end(self) -> None:
        """Nothing more will be published."""
        self._ended = True
        self._changed.set()

    async def wait(self, tokens: int) -> None:
        """Wait until that many leading tokens are published, or the step ended without, or it does not get on."""
        while not self._ended and self._published_tokens < tokens:
            self._changed.clear()
            try:
                async with asyncio.timeout(UNPUBLISHED_MAX_S):
                    await self._changed.wait()
            except TimeoutError:
                return


class Flights:
    """Who computes which blocks on this worker now."""

    def __init__(self) -> None:
        self._flights: dict[BlockHash, Flight] = {}

    def __len__(self) -> int:
        """Blocks under computation."""
        return len(self._flights)

    async def join(self, here: Context) -> None:
        """If another step computes blocks that this one lacks, wait for those and pull them.

        Raises:
            DeadlineExceeded: the deadline of this step has passed.
        """
        first = here.length // here.layout.block_tokens
        flight = self._flights.get(here.hashes[first]) if first < len(here.hashes) else None
        if flight is None or (flight.background and not here.arrival.background):
            return
        last = first
        while last < len(here.hashes) and self._flights.get(here.hashes[last]) is flight:
            last += 1
        async with until(here.deadline_s):
            await flight.wait(last * here.layout.block_tokens)
        await here.locate()
        await here.pull(len(here.tokens) - 1)

    @contextmanager
    def lead(self, here: Context) -> Generator[Flight]:
        """Others that need the full blocks that are missing here wait for this step, until its flight ends."""
        flight = Flight(background=here.arrival.background)
        mine = here.hashes[here.length // here.layout.block_tokens :]
        for block in mine:
            known = self._flights.setdefault(block, flight)
            if known.background and not flight.background:
                self._flights[block] = flight
        try:
            yield flight
        finally:
            flight.end()
            for block in mine:
                if self._flights.get(block) is flight:
                    del self._flights[block]
