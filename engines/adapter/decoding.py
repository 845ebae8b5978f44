"""The decode service over a stock server: one request for a step, its tokens passed on as they come.

Prefill and decode meet in the store: a prefill worker computes a long prompt and waits until its blocks are there, and
this worker's server pulls them when it is asked to go on.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from engines.adapter.books import Books
from engines.adapter.dialect import Cached, Chunk
from tracehaul.rpc.base import CallContext
from tracehaul.rpc.peers import Peers
from tracehaul.runtime import deadline
from tracehaul.runtime.log import Log
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.cluster import Members, NodeInfo
from tracehaul.wire.errors import (
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
    StepDone,
    StepUsage,
    TokenLogprobs,
    Tokens,
)

log = Log(__name__)


class DecodeAdapter:
    """Serves :class:`DecodeStep`. A caller that leaves aborts its request here and on the prefill worker."""

    def __init__(self, books: Books, peers: Peers) -> None:
        self._books = books
        self._peers = peers
        self._prefills: dict[NodeId, NodeInfo] = {}

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
        step = _Step(self._books, self._peers, self._prefills, request, context)
        step.check()
        with self._books.step() as outcome:
            try:
                async with aclosing(step.run()) as replies:
                    async for reply in replies:
                        outcome.ended = isinstance(reply, StepDone)
                        yield reply
            finally:
                step.count()

    def disconnected(self, peer: str) -> None:
        """Nothing is held for a connection beyond its handlers."""


class _Step:
    """One step on this worker, from request to terminal message."""

    def __init__(
        self, books: Books, peers: Peers, prefills: dict[NodeId, NodeInfo], request: DecodeStep, call: CallContext
    ) -> None:
        self._books = books
        self._peers = peers
        self._prefills = prefills
        self._request = request
        self._call = call
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
        request, generating = self._request, self._books.generating
        left = request.sampling.max_tokens - self._emitted
        ask = generating.ask(request, bytes(self._packed), self._emitted, max_tokens=left)
        async with aclosing(generating.run(ask, self._deadline_s)) as chunks:
            async for chunk in chunks:
                self._cached = chunk.cached or self._cached
                if chunk.scores:
                    yield Tokens(b"", prompt_logprobs=tuple(chunk.scores))
                if chunk.tokens and self._reason is None:
                    yield self._tokens(chunk)
                self._reason = self._reason or chunk.finish

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
        )

    # --- by a prefill worker ------------------------------------------------------------------------------

    async def _hand_off(self) -> AsyncGenerator[Tokens, None]:
        """Let the prefill worker compute what is missing, and wait until the store has it.

        Its token is the answer's first where it is greedy: then it is what the server here would say. Elsewhere it is
        sampled here. Whatever goes wrong costs time: what is missing is computed here.
        """
        request, books = self._request, self._books
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
            sampling=request.sampling,
            emitted=self._before,
            family=request.family,
            tenant=request.tenant,
            step_class=request.step_class,
            priority=request.priority,
            deadline_in_s=deadline.left_s(self._deadline_s),
        )
        sampling = request.sampling
        takes = sampling.temperature == 0 and not sampling.penalizes and sampling.constraint is None
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
                        case PrefillProgress() | PrefillDone():
                            pass
                        case PrefillToken(token, computed_from, logprobs):
                            self._computed_from = computed_from
                            if takes and not self._told:
                                self._grow(token)
                                yield self._told_as([token], None if logprobs is None else (logprobs,))
                        case _:
                            raise ProtocolError(f"{prefill.node} answered a prefill with {type(reply).__name__}")
        except DeadlineExceeded:
            raise
        except ClusterError as error:
            self._fallback = error.code
            log.warning("prefill failed: computing here", step=request.step, prefill=request.prefill, reason=error)

    async def _lacks_much(self) -> bool:
        """Whether more is missing than is computed here in any case: neither in the store nor, perhaps, here."""
        request, books, packed = self._request, self._books, bytes(self._packed)
        limit = books.limits.local_prefill_tokens
        here = books.ran.shared(request.salt, request.trace, packed)
        if token_count(packed) - here <= limit:
            return False
        async with deadline.until(self._deadline_s):
            stored = await books.stored.tokens(books.stored.hashes(packed, request.salt))
        return token_count(packed) - max(here, stored) > limit
