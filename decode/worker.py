"""The decode service: assembles a step's context, then streams its tokens and writes its blocks back."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from tracehaul.rpc.base import CallContext, Replies
from tracehaul.rpc.peers import Peers
from tracehaul.runtime.deadline import deadline_at, left_s, until
from tracehaul.runtime.log import Log
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.cluster import Members, NodeInfo
from tracehaul.wire.errors import (
    BudgetExceeded,
    ClusterError,
    DeadlineExceeded,
    InvalidRequest,
    PeerLost,
    ProtocolError,
    WrongNode,
)
from tracehaul.wire.hashing import pack_tokens, token_count
from tracehaul.wire.ids import BlockHash, NodeId
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.spent import Reading
from tracehaul.wire.steps import (
    DecodeStep,
    FinishReason,
    ForgetContext,
    KeepContext,
    PrefillDone,
    PrefillProgress,
    PrefillStep,
    PrefillToken,
    RecallContext,
    Resident,
    StepDone,
    StepUsage,
    TokenLogprobs,
    Tokens,
)
from worker.context import Context
from worker.flights import Flight, Flights
from worker.guides import guide_of
from worker.host import WorkerHost
from worker.iteration import usable_context
from worker.job import Computed, Failed, Job, Published, Sampled, Scored, Suspended, Written
from worker.meter import Account
from worker.orphans import Said, uncharged
from worker.taking_over import Taken, TakingOver

log = Log(__name__)


class DecodeService:
    """Serves :class:`DecodeStep`. A caller that leaves frees its step here and on the prefill worker; what that has
    said is remembered, for a router that comes in the place of one that is lost."""

    def __init__(self, host: WorkerHost, peers: Peers) -> None:
        self._host = host
        self._peers = peers
        self._prefills: dict[NodeId, NodeInfo] = {}
        self.flights = host.flights
        self.taking_over = TakingOver()

    def set_members(self, members: Members) -> None:
        """Membership changed."""
        self._host.set_nodes(members.nodes, members.draining)
        self._prefills = {node.node: node for node in members.nodes if node.role == "prefill"}

    async def call(self, request: Request, context: CallContext) -> Reply:
        match request:
            case Ping():
                return Ok()
            case KeepContext(trace, salt, for_s):
                return Resident(self._host.keep(trace, salt, for_s))
            case ForgetContext(trace, salt):
                return Resident(await self._host.forget(trace, salt))
            case RecallContext(trace, root, tokens, salt, keep_s, told):
                self._check_root(root)
                return Resident(await self._host.recall(trace, salt, tokens, keep_s, told=told))
            case _:
                raise WrongNode(f"a decode worker does not serve {type(request).__name__}")

    def _check_root(self, root: BlockHash) -> None:
        if root != self._host.root:
            raise WrongNode("this worker's KV has another layout, or is of another model")

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        if not isinstance(request, DecodeStep):
            raise WrongNode(f"a decode worker does not serve {type(request).__name__}")
        stats = self._host.stats
        stats.steps += 1
        ended = False
        try:
            async with (
                self.taking_over.of(request, context.peer) as taken,
                aclosing(self._run(taken, context)) as replies,
            ):
                async for reply in replies:
                    ended = isinstance(reply, StepDone)
                    yield reply
        except ClusterError:
            ended = True
            stats.steps_failed += 1
            raise
        finally:
            stats.steps_aborted += not ended

    async def _run(self, taken: Taken, context: CallContext) -> AsyncGenerator[Reply, None]:
        for reply in taken.told:
            yield reply
        self._host.stats.tokens_again += taken.tokens_again
        if taken.over:
            return
        with self._host.meter.step(taken.request) as account:
            step = _Step(self._host, self._peers, self._prefills, self.flights, taken.request, context, account)
            try:
                async with aclosing(step.run()) as replies:
                    async for reply in replies:
                        account.told = isinstance(reply, StepDone)
                        yield reply
            finally:
                self._host.stats.output_tokens += step.sampled
                taken.said = step.said or taken.said

    def disconnected(self, peer: str) -> None:
        self.taking_over.lost(peer)


class _Step:
    """One step on this worker, from context to terminal message."""

    def __init__(
        self,
        host: WorkerHost,
        peers: Peers,
        prefills: dict[NodeId, NodeInfo],
        flights: Flights,
        request: DecodeStep,
        call: CallContext,
        account: Account,
    ) -> None:
        self._host = host
        self._peers = peers
        self._prefills = prefills
        self._flights = flights
        self._request = request
        self._call = call
        self._account = account
        self._prefill_reading = Reading()
        account.allow(request.allowance, self._prefill_reading)
        self._prompt_tokens = token_count(request.prompt)
        self._computed_from = self._prompt_tokens
        self._deadline_s = deadline_at(request.deadline_in_s)
        self._first: Context | None = None
        """Where it began: what a suspended step pulls again is no part of its account."""
        self._scored = 0
        """Tokens of the prompt whose scores were told."""
        self._reason: FinishReason | None = None
        self._fallback = ""
        self._told_usage = False
        self._published_tokens = 0
        self.sampled = 0
        self.said: Said | None = None
        """As far as it came, once it has a context."""

    async def run(self) -> AsyncGenerator[Reply, None]:
        """Tokens, then one StepDone."""
        request = self._request
        packed = request.prompt + request.emitted
        if request.root != self._host.root:
            raise WrongNode("this worker's KV has another layout, or is of another model")
        if not self._prompt_tokens or self._left(token_count(packed)) < 1:
            raise InvalidRequest("a step needs a prompt and at least one token left to sample")
        suspended: Context | None = None
        while True:
            length = token_count(packed)
            room = length + min(self._left(length), self._host.config.headroom_tokens)
            async with self._host.context(
                request.trace,
                request.family,
                request.salt,
                packed,
                room,
                suspended,
                background=request.step_class == "background",
                deadline_s=self._deadline_s,
                account=self._account,
            ) as here:
                try:
                    async with aclosing(self._run_on(here)) as replies:
                        async for reply in replies:
                            yield reply
                finally:
                    self._came_to(here)
                if self._reason is not None:
                    yield StepDone(self._reason, self._usage(here), here.length, self._published_tokens)
                    return
            suspended, packed = here, here.tokens.tobytes()

    def _came_to(self, here: Context) -> None:
        """Nothing more is sampled here. What an iteration under way had sampled when the caller left is among it."""
        output = here.tokens[self._prompt_tokens :]
        self.sampled = len(output) - token_count(self._request.emitted)
        reason = self._reason
        if output and self.sampled and reason is None:
            sampling, length = self._request.sampling, len(here.tokens)
            reason = sampling.finish_reason(output[-1], len(output), length, usable_context(self._host.engine.info))
        self.said = Said(output.tobytes(), uncharged(self._usage(here)), reason, here.length, self._published_tokens)

    def _left(self, length: int) -> int:
        """How many more may be sampled after so many tokens."""
        return self._request.sampling.max_tokens - (length - self._prompt_tokens)

    @property
    def _scores(self) -> bool:
        """Whether the prompt's tokens are to be scored, and not all of them are."""
        return self._request.prompt_logprobs is not None and self._scored < self._prompt_tokens - 1

    async def _run_on(self, here: Context) -> AsyncGenerator[Tokens, None]:
        """Until the step ends, or has to give its memory to others: then it goes on from the store when there is
        some again."""
        await here.locate()
        if self._scores:
            here.forget()
        else:
            async with aclosing(self._assemble(here)) as replies:
                async for reply in replies:
                    yield reply
        if self._first is None:
            self._first = here
            self._host.stats.prompt_tokens += self._prompt_tokens
        if self._reason is None:
            with self._flights.lead(here) as flight:
                async with aclosing(self._decode(here, flight)) as replies:
                    async for reply in replies:
                        yield reply

    def _usage(self, here: Context) -> StepUsage:
        first = self._first or here
        return StepUsage(
            prompt_tokens=self._prompt_tokens,
            output_tokens=len(here.tokens) - self._prompt_tokens,
            resident_tokens=min(first.resident_tokens, self._prompt_tokens),
            pulled_tokens=first.pulled.tokens,
            computed_from=self._computed_from,
            pulled_bytes=first.pulled.nbytes,
            pull_s=first.pulled.seconds,
            missed_blocks=first.pulled.missed_blocks,
            prefill_fallback=self._fallback,
            reading=self._account.reading,
            prefill_reading=self._prefill_reading,
        )

    def _token(self, here: Context, token: int, logprobs: TokenLogprobs | None) -> Tokens:
        usage = None if self._told_usage else self._usage(here)
        self._told_usage = True
        return Tokens(pack_tokens([token]), usage, None if logprobs is None else (logprobs,))

    async def _assemble(self, here: Context) -> AsyncGenerator[Tokens, None]:
        """Bring in what others have of the context, or are computing."""
        limit, wanted = self._request.pull_tokens, len(here.tokens) - 1
        await here.pull(wanted if limit is None else min(limit, wanted))
        if len(here.tokens) - here.length > self._host.config.local_prefill_tokens:
            async with aclosing(self._hand_off(here)) as replies:
                async for reply in replies:
                    yield reply
        if self._reason is None:
            await self._flights.join(here)

    async def _hand_off(self, here: Context) -> AsyncGenerator[Tokens, None]:
        """Let the prefill worker compute what is missing, pulling each run of blocks as it is published.

        Whatever goes wrong there or on the way costs time: what is missing afterwards is computed here. Its token is
        kept once it arrived.
        """
        request = self._request
        if request.prefill is None:
            return
        wanted, emitted = len(here.tokens), len(here.tokens) - self._prompt_tokens
        before = here.length
        step = PrefillStep(
            step=request.step,
            trace=request.trace,
            root=request.root,
            tokens=here.packed,
            salt=request.salt,
            home=request.home,
            sampling=request.sampling,
            emitted=emitted,
            family=request.family,
            tenant=request.tenant,
            step_class=request.step_class,
            priority=request.priority,
            deadline_in_s=left_s(self._deadline_s),
            known_tokens=request.known_tokens,
            seconds_max=self._account.prefill_max_s(request.allowance, self._prefill_reading),
        )
        try:
            prefill = self._prefills.get(request.prefill)
            if prefill is None:
                raise PeerLost(f"no prefill worker {request.prefill}")
            replies = self._peers.stream(
                prefill.address, step, idle_timeout_s=self._host.config.prefill_idle_timeout_s, context=self._call
            )
            async with aclosing(replies):
                while (reply := await self._next(replies)) is not None:
                    match reply:
                        case PrefillProgress(published, reading) | PrefillDone(published, reading):
                            self._billed(reading)
                            self._published_tokens = published
                            await here.locate(published)
                            await here.pull(min(published, wanted))
                        case PrefillToken(token, computed_from, logprobs, reading) if len(here.tokens) == wanted:
                            self._billed(reading)
                            self._computed_from = min(self._computed_from, computed_from)
                            here.tokens.append(token)
                            self._reason = request.sampling.finish_reason(
                                token, emitted + 1, len(here.tokens), usable_context(self._host.engine.info)
                            )
                            yield self._token(here, token, logprobs)
                        case _:
                            raise ProtocolError(f"{prefill.node} answered a prefill with {type(reply).__name__}")
        except (DeadlineExceeded, BudgetExceeded):
            raise
        except ClusterError as error:
            self._fallback = error.code
            self._computed_from = min(self._computed_from, before)
            self._host.stats.prefill_fallbacks += 1
            log.warning("prefill failed: computing here", step=request.step, prefill=request.prefill, reason=error)

    def _billed(self, reading: Reading) -> None:
        self._prefill_reading = reading
        self._account.allow(self._request.allowance, reading)

    async def _next(self, replies: Replies) -> Reply | None:
        async with until(self._deadline_s):
            return await anext(replies, None)

    async def _decode(self, here: Context, flight: Flight) -> AsyncGenerator[Tokens, None]:
        """Compute what is still missing, then one token after the other, until the step ends or is suspended."""
        self._account.check()
        if here.length == len(here.tokens):  # all of it was pulled, and nobody sampled what follows
            self._host.engine.truncate(here.sequence, here.length - 1)
        self._computed_from = min(self._computed_from, here.length)
        emitted = len(here.tokens) - self._prompt_tokens
        guide = await guide_of(
            self._host.engine, self._request.sampling, here.tokens[self._prompt_tokens :], self._deadline_s
        )
        job = Job(
            arrival=here.arrival,
            came_s=here.came_s,
            sequence=here.sequence,
            tokens=here.tokens,
            sampling=self._request.sampling,
            emitted=emitted,
            samples_max=self._request.sampling.max_tokens - emitted,
            computed=here.length,
            deadline_s=self._deadline_s,
            guide=guide,
            copying=here.copying,
            scores_top=self._request.prompt_logprobs if self._scores else None,
            scores_end=self._prompt_tokens,
            account=self._account,
        )
        failed: ClusterError | None = None
        suspended, scored = False, here.length
        async with self._host.writer(here, self._request.home, flight.published, flight.end) as writer:
            async with self._host.job(job):
                while failed is None and self._reason is None and not suspended:
                    match await job.events.get():
                        case Computed(length):
                            writer.computed(length)
                        case Sampled(token, reason, logprobs):
                            self._reason = reason
                            yield self._token(here, token, logprobs)
                        case Scored(scores):
                            new = scores[max(0, self._scored - scored) :]
                            scored += len(scores)
                            self._scored = max(self._scored, scored)
                            if new:
                                yield Tokens(b"", prompt_logprobs=new)
                        case Suspended():
                            suspended = True
                        case Failed(failed):
                            pass
                        case Published() | Written():
                            raise AssertionError("nobody publishes into a decode job's events")
            # Also where the step has to leave: another worker, or this one later, pulls what was computed.
            await writer.finish()
            self._published_tokens = writer.published_tokens
        if failed is not None:
            raise failed
