"""The decode service over a stock server: one request for a step, its tokens passed on as they come.

Prefill and decode meet in the store: a prefill worker computes a long prompt and waits until its blocks are there, and
this worker's server pulls them when it is asked to go on.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from engines.adapter.books import Books
from engines.adapter.dialect import Cached, Chunk
from engines.adapter.thinking import Thoughts, answer, thinks
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import clock, deadline
from tracehaul.runtime.log import Log
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.cluster import Members, NodeInfo
from tracehaul.wire.errors import (
    BudgetExceeded,
    CannotContinue,
    ClusterError,
    DeadlineExceeded,
    InvalidRequest,
    PeerLost,
    ProtocolError,
    WrongNode,
)
from tracehaul.wire.hashing import TOKEN_BYTES, pack_tokens, token_count
from tracehaul.wire.ids import NodeId
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
    Resident,
    Sampling,
    StepDone,
    StepUsage,
    TokenLogprobs,
    Tokens,
)
from worker.meter import Account
from worker.orphans import Said, uncharged
from worker.taking_over import Taken, TakingOver

log = Log(__name__)


class DecodeAdapter:
    """Serves :class:`DecodeStep`. A caller that leaves aborts its request here and on the prefill worker."""

    def __init__(self, books: Books, peers: Peers) -> None:
        self._books = books
        self._peers = peers
        self._prefills: dict[NodeId, NodeInfo] = {}
        self.taking_over = TakingOver()

    def set_members(self, members: Members) -> None:
        """Membership changed."""
        self._prefills = {node.node: node for node in members.nodes if node.role == "prefill"}

    async def call(self, request: Request, context: CallContext) -> Reply:
        match request:
            case Ping():
                return Ok()
            case KeepContext():
                return Resident(0)  # what the server keeps is its own decision
            case ForgetContext(trace, salt):
                self._books.ran.forget(salt, trace)
                return Resident(0)
            case _:
                raise WrongNode(f"this decode worker does not serve {type(request).__name__}")

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        if not isinstance(request, DecodeStep):
            raise WrongNode(f"a decode worker does not serve {type(request).__name__}")
        async with self.taking_over.of(request, context.peer, goes_on=_goes_on(request.sampling)) as taken:
            self._books.stats.tokens_again += taken.tokens_again
            for reply in taken.told:
                yield reply
            if not taken.over:
                async with aclosing(self._run(taken, context)) as replies:
                    async for reply in replies:
                        yield reply

    async def _run(self, taken: Taken, context: CallContext) -> AsyncGenerator[Reply, None]:
        with self._books.meter.step(taken.request) as account:
            step = _Step(self._books, self._peers, self._prefills, taken.request, context, account)
            step.check()
            with self._books.step() as outcome:
                try:
                    async with aclosing(step.run()) as replies:
                        async for reply in replies:
                            if isinstance(reply, StepDone):
                                outcome.ended, account.told, step.done = True, True, reply
                            yield reply
                finally:
                    step.count()
                    taken.said = step.said or taken.said

    def disconnected(self, peer: str) -> None:
        self.taking_over.lost(peer)


def _goes_on(sampling: Sampling) -> bool:
    """Whether a server goes on with an answer as it would have, had it not been broken off."""
    return not (sampling.penalizes or sampling.constraint is not None or (sampling.seeded and sampling.temperature > 0))


class _Step:
    """One step on this worker, from request to terminal message."""

    def __init__(
        self,
        books: Books,
        peers: Peers,
        prefills: dict[NodeId, NodeInfo],
        request: DecodeStep,
        call: CallContext,
        account: Account,
    ) -> None:
        self._books = books
        self._peers = peers
        self._prefills = prefills
        self._request = request
        self._call = call
        self._account = account
        self._prefill_reading = Reading()
        self._deadline_s = deadline.deadline_at(request.deadline_in_s)
        self._prompt_tokens = token_count(request.prompt)
        self._before = token_count(request.emitted)
        self._packed = bytearray(request.prompt + request.emitted)
        """Grows with the output."""
        self._reason: FinishReason | None = None
        self._cached: Cached | None = None
        """As the server says."""
        self._computed_from: int | None = None
        """As the prefill worker says: what it computed is no hit."""
        self._fallback = ""
        self._told = False
        self.done: StepDone | None = None
        """As it was told."""

    def check(self) -> None:
        """Raises ClusterError if it cannot run here."""
        request, sampling = self._request, self._request.sampling
        self._books.check(request.root, bytes(self._packed))
        if not self._prompt_tokens or self._before >= sampling.max_tokens:
            raise InvalidRequest("a step needs a prompt and at least one token left to sample")
        if self._before and (sampling.penalizes or sampling.constraint is not None):
            raise CannotContinue("this engine continues no answer with penalties or within a grammar")

    def count(self) -> None:
        """It is over."""
        stats, cached = self._books.stats, self._cached or Cached(0)
        stats.prompt_tokens += self._prompt_tokens
        stats.output_tokens += self._emitted - self._before
        stats.device_tokens += cached.device
        stats.host_tokens += cached.host
        stats.store_tokens += cached.store
        stats.prefill_fallbacks += self._fallback != ""
        if self._told:
            self._books.ran.add(self._request.salt, self._request.trace, bytes(self._packed))

    @property
    def said(self) -> Said | None:
        """What it has said; None: nothing new."""
        if self._emitted == self._before:
            return None
        packed, done = bytes(self._packed[self._prompt_tokens * TOKEN_BYTES :]), self.done
        if done is None:
            return Said(packed, uncharged(self._usage()), self._reason, self._length - 1)
        return Said(packed, uncharged(done.usage), done.reason, done.retained_tokens, done.published_tokens)

    @property
    def _emitted(self) -> int:
        return self._length - self._prompt_tokens

    @property
    def _length(self) -> int:
        return len(self._packed) // TOKEN_BYTES

    async def run(self) -> AsyncGenerator[Reply, None]:
        """Tokens, then one StepDone."""
        async with aclosing(self._hand_off()) as replies:
            async for reply in replies:
                yield reply
        if self._reason is None:
            async with aclosing(self._decode()) as replies:
                async for reply in replies:
                    yield reply
        assert self._reason is not None
        stored = self._books.stored
        length = self._length - 1  # nothing was computed after the last
        async with deadline.until(self._deadline_s):
            published = await stored.tokens(
                stored.hashes(bytes(self._packed[: length * TOKEN_BYTES]), self._request.salt)
            )
        yield StepDone(self._reason, self._usage(), length, published)

    async def _decode(self) -> AsyncGenerator[Tokens, None]:
        request = self._request
        if thinks(request.sampling):
            thoughts = Thoughts(self._books.marks, request)
            async with aclosing(self._ask(thoughts.ask(request), thoughts)) as replies:
                async for reply in replies:
                    yield reply
            if self._reason is not None:
                return
            self._cached = self._cached or Cached(0)  # what is cached of the next request is what this one has computed
            request = answer(request)
        async with aclosing(self._ask(request)) as replies:
            async for reply in replies:
                yield reply

    async def _ask(self, request: DecodeStep, thoughts: Thoughts | None = None) -> AsyncGenerator[Tokens, None]:
        """One request for the rest of the step, or for the reasoning that it begins with."""
        generating, known = self._books.generating, self._cached
        left = request.sampling.max_tokens - self._emitted
        missing = await self._missing() if generating.facts.priorities else 0
        ask = generating.ask(request, bytes(self._packed), self._emitted, max_tokens=left, missing=missing)
        self._check_budget()
        with self._books.serving(self._account):
            async with aclosing(generating.run(ask, self._deadline_s)) as chunks:
                async for chunk in chunks:
                    self._cached = known or chunk.cached or self._cached
                    if chunk.scores:
                        yield Tokens(b"", prompt_logprobs=tuple(chunk.scores))
                    told = chunk if thoughts is None else thoughts.take(chunk)
                    if told.tokens:
                        cached = 0 if self._cached is None else self._cached.tokens
                        self._books.sharing.said(self._account, cached, clock.now_s())
                    if told.tokens and self._reason is None:
                        yield self._tokens(told)
                    over = thoughts is not None and thoughts.over
                    if (self._reason is not None or over) and chunk.finish is None:
                        return  # the server would go on
                    self._reason = self._reason if over else self._reason or chunk.finish
                    if self._reason is None:
                        self._check_budget()

    def _check_budget(self) -> None:
        """Raises BudgetExceeded if it has taken what it may."""
        self._account.allow(self._request.allowance, self._prefill_reading)
        self._account.check()

    def _tokens(self, chunk: Chunk) -> Tokens:
        """Those of them that belong to the answer: where it ends is decided here, as everywhere in the fleet."""
        count = 0
        for token in chunk.tokens:
            count += 1
            self._grow(token)
            if self._reason is not None:
                break
        logprobs = None if chunk.logprobs is None else tuple(chunk.logprobs[:count])
        return self._told_as(chunk.tokens[:count], logprobs)

    def _grow(self, token: int) -> None:
        self._packed += pack_tokens([token])
        self._reason = self._request.sampling.finish_reason(token, self._emitted, self._length, self._books.context_max)

    def _told_as(self, tokens: list[int], logprobs: tuple[TokenLogprobs, ...] | None) -> Tokens:
        usage = None if self._told or (self._cached is None and self._computed_from is None) else self._usage()
        self._told = True
        return Tokens(pack_tokens(tokens), usage, logprobs)

    def _usage(self) -> StepUsage:
        cached = self._cached or Cached(0)
        computed_from = min(cached.tokens, self._prompt_tokens)
        if self._computed_from is not None:
            computed_from = min(computed_from, self._computed_from) if self._cached else self._computed_from
        return StepUsage(
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._emitted,
            resident_tokens=min(cached.device + cached.host, self._prompt_tokens),
            host_tokens=min(cached.host, self._prompt_tokens),
            pulled_tokens=cached.store,
            computed_from=computed_from,
            prefill_fallback=self._fallback,
            reading=self._account.reading,
            prefill_reading=self._prefill_reading,
        )

    # --- by a prefill worker ------------------------------------------------------------------------------

    async def _hand_off(self) -> AsyncGenerator[Tokens, None]:
        """Let the prefill worker compute what is missing, and wait until the store has it.

        Its token is the answer's first where it is greedy: then it is what the server here would say. Elsewhere it is
        sampled here. Whatever goes wrong costs time: what is missing is computed here.
        """
        request, books = self._request, self._books
        sampling = request.sampling
        if thinks(sampling):  # its token is the reasoning's, and not taken
            sampling = msgspec.structs.replace(sampling, constraint=None)
        if request.prefill is None or request.prompt_logprobs is not None or not books.stored.shares:
            return
        if not await self._lacks_much():
            return
        step = PrefillStep(
            step=request.step,
            trace=request.trace,
            root=request.root,
            tokens=bytes(self._packed),
            salt=request.salt,
            home=request.home,
            sampling=sampling,
            emitted=self._before,
            family=request.family,
            tenant=request.tenant,
            step_class=request.step_class,
            priority=request.priority,
            deadline_in_s=deadline.left_s(self._deadline_s),
            known_tokens=request.known_tokens,
        )
        takes = sampling.temperature == 0 and not sampling.penalizes and request.sampling.constraint is None
        try:
            prefill = self._prefills.get(request.prefill)
            if prefill is None:
                raise PeerLost(f"no prefill worker {request.prefill}")
            replies = self._peers.stream(
                prefill.address, step, idle_timeout_s=books.limits.prefill_idle_timeout_s, context=self._call
            )
            books.stats.handed_off += 1
            async with aclosing(replies):
                while True:
                    async with deadline.until(self._deadline_s):
                        reply = await anext(replies, None)
                    match reply:
                        case None:
                            return
                        case PrefillProgress(_, reading) | PrefillDone(_, reading):
                            self._prefill_reading = reading
                        case PrefillToken(token, computed_from, logprobs, reading):
                            self._prefill_reading = reading
                            self._computed_from = computed_from
                            if takes and not self._told:
                                self._grow(token)
                                yield self._told_as([token], None if logprobs is None else (logprobs,))
                        case _:
                            raise ProtocolError(f"{prefill.node} answered a prefill with {type(reply).__name__}")
        except (DeadlineExceeded, BudgetExceeded):
            raise
        except ClusterError as error:
            self._fallback = error.code
            log.warning("prefill failed: computing here", step=request.step, prefill=request.prefill, reason=error)

    async def _lacks_much(self) -> bool:
        """Whether more is missing than is computed here in any case: neither in the store nor, perhaps, here."""
        limit = self._books.limits.local_prefill_tokens
        request = self._request
        here = self._books.ran.shared(request.salt, request.trace, bytes(self._packed))
        return self._length - here > limit and await self._missing() > limit

    async def _missing(self) -> int:
        """Tokens that are to be computed, as far as it is known where the rest is."""
        request, books, packed = self._request, self._books, bytes(self._packed)
        here = books.ran.shared(request.salt, request.trace, packed)
        async with deadline.until(self._deadline_s):
            stored = await books.stored.tokens(books.stored.hashes(packed, request.salt))
        return self._length - max(here, stored)
