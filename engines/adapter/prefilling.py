"""The prefill service over a stock server: one token is asked for, and what was computed awaited in the store."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from engines.adapter.books import Books
from tracehaul.rpc.base import CallContext
from tracehaul.runtime import clock, deadline
from tracehaul.wire.base import Ok, Ping
from tracehaul.wire.errors import InvalidRequest, PeerLost, WrongNode
from tracehaul.wire.hashing import token_count
from tracehaul.wire.messages import Reply, Request
from tracehaul.wire.steps import PrefillDone, PrefillProgress, PrefillStep, PrefillToken
from worker.meter import Account


class PrefillAdapter:
    """Serves :class:`PrefillStep`. A caller that leaves aborts its request."""

    def __init__(self, books: Books, stored_timeout_s: float) -> None:
        self._books = books
        self._stored_timeout_s = stored_timeout_s

    async def call(self, request: Request, context: CallContext) -> Reply:
        if isinstance(request, Ping):
            return Ok()
        raise WrongNode(f"a prefill worker does not serve {type(request).__name__}")

    async def stream(self, request: Request, context: CallContext) -> AsyncGenerator[Reply, None]:
        if not isinstance(request, PrefillStep):
            raise WrongNode(f"a prefill worker does not serve {type(request).__name__}")
        books = self._books
        if not request.tokens:
            raise InvalidRequest("a step needs a prompt")
        books.check(request.root, request.tokens)
        deadline_s = deadline.deadline_at(request.deadline_in_s)
        with books.step() as outcome, books.meter.step(request) as account:
            async with aclosing(self._run(request, account, deadline_s)) as replies:
                async for reply in replies:
                    outcome.ended = account.told = isinstance(reply, PrefillDone)
                    yield reply

    def disconnected(self, peer: str) -> None:
        """Nothing is held for a connection beyond its handlers."""

    async def _run(
        self, request: PrefillStep, account: Account, deadline_s: float | None
    ) -> AsyncGenerator[Reply, None]:
        books, token = self._books, None
        ask = books.generating.ask(request, request.tokens, request.emitted, max_tokens=1)
        with books.serving(account):
            async with aclosing(books.generating.run(ask, deadline_s)) as chunks:
                async for chunk in chunks:
                    if chunk.tokens and token is None:
                        token = chunk.tokens[0]
                        computed_from = 0 if chunk.cached is None else min(chunk.cached.tokens, len(ask.tokens) - 1)
                        books.sharing.said(account, computed_from, clock.now_s())
                        logprobs = None if chunk.logprobs is None else chunk.logprobs[0]
                        yield PrefillToken(token, computed_from, logprobs, account.reading)
        if token is None:
            raise PeerLost("the engine's server computed a prompt and told no token")
        books.stats.prompt_tokens += token_count(request.tokens)
        hashes = books.stored.hashes(request.tokens, request.salt)
        async with deadline.until(deadline_s):
            published = await books.stored.wait(hashes, self._stored_timeout_s)
        books.stats.stored_late += published < books.stored.covered(hashes)
        yield PrefillProgress(published, account.reading)
        yield PrefillDone(published, account.reading)
