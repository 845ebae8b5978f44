"""The prefill service: computes what a prompt's context lacks, publishing each block as its chunk ends."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from tracehaul.rpc.base import CallContext
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.errors import WrongNode
from tracehaul.wire.hashing import unpack_tokens
from tracehaul.wire.ids import BlockHash
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.steps import PrefillDone, PrefillProgress, PrefillStep, PrefillToken
from worker.context import Context
from worker.host import WorkerHost
from worker.iteration import Computed, Failed, Job, Published, Sampled

PATIENCE_S = 5.0
"""How long another step may publish nothing before its work is not waited for: its caller may be frozen."""


@dataclass
class _Flight:
    """One step's computation, as others that need the same blocks see it."""

    published_tokens: int = 0
    ended: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def published(self, tokens: int) -> None:
        """Wait until that many leading tokens are published, or the step ended without, or it does not get on."""
        while not self.ended and self.published_tokens < tokens:
            self.changed.clear()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self.changed.wait()
            except TimeoutError:
                return


class PrefillService:
    """Serves :class:`PrefillStep`. A caller that leaves frees its step: memory, reservations and its turn."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host
        self._flights: dict[BlockHash, _Flight] = {}

    async def call(self, request: Request, context: CallContext) -> Reply:
        if isinstance(request, Ping):
            return Ok()
        raise WrongNode(f"a prefill worker does not serve {type(request).__name__}")

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        if not isinstance(request, PrefillStep):
            raise WrongNode(f"a prefill worker does not serve {type(request).__name__}")
        if request.root != self._host.root:
            raise WrongNode("this worker's KV has another layout, or is of another model")
        self._host.stats.steps += 1
        tokens = unpack_tokens(request.tokens)
        async with self._host.context(request.trace, request.salt, tokens, len(tokens)) as here:
            await here.locate()
            await here.pull(len(tokens) - 1)
            await self._join(here)
            flight = self._depart(here)
            try:
                async with aclosing(self._compute(request, here, flight)) as replies:
                    async for reply in replies:
                        yield reply
            finally:
                self._land(here, flight)

    def disconnected(self, peer: str) -> None:
        """Nothing is held for a connection beyond its handlers."""

    async def _join(self, here: Context) -> None:
        """If another step computes blocks that this one lacks, wait for those and pull them."""
        first = here.length // here.layout.block_tokens
        flight = self._flights.get(here.hashes[first]) if first < len(here.hashes) else None
        if flight is None:
            return
        last = first
        while last < len(here.hashes) and self._flights.get(here.hashes[last]) is flight:
            last += 1
        await flight.published(last * here.layout.block_tokens)
        await here.locate()
        await here.pull(len(here.tokens) - 1)

    def _depart(self, here: Context) -> _Flight:
        flight = _Flight()
        for block in here.hashes[here.length // here.layout.block_tokens :]:
            self._flights.setdefault(block, flight)
        return flight

    def _land(self, here: Context, flight: _Flight) -> None:
        flight.ended = True
        flight.changed.set()
        for block in here.hashes:
            if self._flights.get(block) is flight:
                del self._flights[block]

    async def _compute(
        self, request: PrefillStep, here: Context, flight: _Flight
    ) -> AsyncGenerator[PrefillProgress | PrefillToken | PrefillDone, None]:
        computed_from = here.length
        guide = await self._host.guide(request.sampling, here.tokens[len(here.tokens) - request.emitted :])
        job = Job(
            sequence=here.sequence,
            tokens=here.tokens,
            sampling=request.sampling,
            emitted=request.emitted,
            samples_max=1,
            computed=here.length,
            guide=guide,
            copying=here.copying,
        )

        def published(tokens: int) -> None:
            flight.published_tokens = tokens
            flight.changed.set()
            job.events.put_nowait(Published(tokens))

        async with self._host.writer(here, request.home, published) as writer:
            async with self._host.job(job):
                while True:
                    match await job.events.get():
                        case Computed(length):
                            writer.computed(length)
                        case Published(length):
                            yield PrefillProgress(length)
                        case Sampled(token, _, logprobs):
                            yield PrefillToken(token, computed_from, logprobs)
                            break
                        case Failed(error):
                            raise error
            await writer.finish()
            yield PrefillDone(writer.published_tokens)
