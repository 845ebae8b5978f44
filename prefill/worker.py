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
from worker.flights import Flight, Flights
from worker.host import WorkerHost
from worker.iteration import Computed, Failed, Job, Published, Sampled, Scored, Suspended, Written


class PrefillService:
    """Serves :class:`PrefillStep`. A caller that leaves frees its step: memory, reservations and its turn."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host
        self.flights = Flights()

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
        packed, tokens = request.tokens, token_count(request.tokens)
        deadline_s = deadline_at(request.deadline_in_s)
        async with self._host.context(
            request.trace, request.family, request.salt, packed, tokens, deadline_s=deadline_s
        ) as here:
            await here.locate()
            await here.pull(tokens - 1)
            await self.flights.join(here)
            with self.flights.lead(here) as flight:
                async with aclosing(self._compute(request, here, flight)) as replies:
                    async for reply in replies:
                        yield reply

    def disconnected(self, peer: str) -> None:
        """Nothing is held for a connection beyond its handlers."""

    async def _compute(
        self, request: PrefillStep, here: Context, flight: Flight
    ) -> AsyncGenerator[PrefillProgress | PrefillToken | PrefillDone, None]:
        computed_from, end = here.length, len(here.tokens)
        guide = await self._host.guide(request.sampling, here.tokens[end - request.emitted :], here.deadline_s)
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
        )

        def published(tokens: int) -> None:
            flight.published(tokens)
            job.events.put_nowait(Published(tokens))

        def written() -> None:
            flight.end()
            job.events.put_nowait(Written())

        sampled = ended = False
        async with self._host.writer(here, request.home, published, written) as writer:
            async with self._host.job(job):
                while not (sampled and ended):
                    match await job.events.get():
                        case Computed(length):
                            writer.computed(length, last=length == end)  # the tail travels with the last blocks
                        case Published(length):
                            yield PrefillProgress(length)
                        case Sampled(token, _, logprobs):
                            yield PrefillToken(token, computed_from, logprobs)
                            sampled = True
                        case Written():
                            ended = True
                        case Failed(error):
                            raise error
                        case Suspended():
                            raise AssertionError("a prompt's memory is all there before it is computed")
                        case Scored():
                            raise AssertionError("prompts are scored where they are decoded")
            yield PrefillDone(writer.published_tokens)
