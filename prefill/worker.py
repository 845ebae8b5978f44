"""The prefill service: computes what a prompt's context lacks, publishing each block as its chunk ends."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from tracehaul.rpc.base import CallContext
from tracehaul.runtime.deadline import deadline_at
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.cluster import Members
from tracehaul.wire.errors import WrongNode
from tracehaul.wire.hashing import token_count
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.steps import PrefillDone, PrefillProgress, PrefillStep, PrefillToken
from worker.context import Context
from worker.flights import Flight
from worker.guides import guide_of
from worker.host import WorkerHost
from worker.job import Computed, Failed, Job, Published, Sampled, Scored, Suspended, Written
from worker.meter import Account


class PrefillService:
    """Serves :class:`PrefillStep`. A caller that leaves frees its step: memory, reservations and its turn."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host
        self.flights = host.flights
        self.taking_over = None
        """It has no router, but the decode worker that asks."""

    def set_members(self, members: Members) -> None:
        """Membership changed."""
        self._host.set_nodes(members.nodes, members.draining)

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
        with self._host.meter.step(request) as account:
            account.limit_s = request.seconds_max
            account.check()
            async with aclosing(self._run(request, account)) as replies:
                async for reply in replies:
                    account.told = isinstance(reply, PrefillDone)
                    yield reply

    async def _run(self, request: PrefillStep, account: Account) -> AsyncGenerator[Reply, None]:
        packed, tokens = request.tokens, token_count(request.tokens)
        deadline_s = deadline_at(request.deadline_in_s)
        suspended, computed_from = None, tokens
        while True:
            async with self._host.context(
                request.trace,
                request.family,
                request.salt,
                packed,
                tokens,
                suspended,
                background=request.step_class == "background",
                deadline_s=deadline_s,
                account=account,
            ) as here:
                await here.locate()
                await here.pull(tokens - 1)
                await self.flights.join(here)
                computed_from = min(computed_from, here.length)  # what a suspended step pulls again was computed here
                with self.flights.lead(here) as flight:
                    async with aclosing(self._compute(request, here, flight, account, computed_from)) as replies:
                        async for reply in replies:
                            yield reply
                            if isinstance(reply, PrefillDone):
                                return
            suspended = here

    def disconnected(self, peer: str) -> None:
        """Nothing is held for a connection beyond its handlers."""

    async def _compute(
        self, request: PrefillStep, here: Context, flight: Flight, account: Account, computed_from: int
    ) -> AsyncGenerator[PrefillProgress | PrefillToken | PrefillDone, None]:
        """To the end, which :class:`PrefillDone` tells; or until it has to give its memory to others."""
        end = len(here.tokens)
        guide = await guide_of(
            self._host.engine, request.sampling, here.tokens[end - request.emitted :], here.deadline_s
        )
        job = Job(
            arrival=here.arrival,
            came_s=here.came_s,
            sequence=here.sequence,
            tokens=here.tokens,
            sampling=request.sampling,
            emitted=request.emitted,
            samples_max=1,
            computed=here.length,
            deadline_s=here.deadline_s,
            guide=guide,
            copying=here.copying,
            account=account,
        )

        def published(tokens: int) -> None:
            flight.published(tokens)
            job.events.put_nowait(Published(tokens))

        def written() -> None:
            flight.end()
            job.events.put_nowait(Written())

        sampled = ended = suspended = False
        async with self._host.writer(here, request.home, published, written) as writer:
            async with self._host.job(job):
                while not (suspended or (sampled and ended)):
                    match await job.events.get():
                        case Computed(length):
                            writer.computed(length, last=length == end)  # the tail travels with the last blocks
                        case Published(length):
                            yield PrefillProgress(length, account.reading)
                        case Sampled(token, _, logprobs):
                            yield PrefillToken(token, computed_from, logprobs, account.reading)
                            sampled = True
                        case Written():
                            ended = True
                        case Failed(error):
                            raise error
                        case Suspended():
                            suspended = True
                        case Scored():
                            raise AssertionError("prompts are scored where they are decoded")
            if suspended:
                await writer.finish()
            else:
                yield PrefillDone(writer.published_tokens, account.reading)
