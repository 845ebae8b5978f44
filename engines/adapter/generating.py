"""One request to a stock server, from being sent to its end, whatever way."""

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing

from engines.adapter.config import AdapterConfig
from engines.adapter.dialect import Ask, Chunk, Dialect, Facts
from engines.adapter.server import StockServer
from engines.adapter.watch import Watch
from tracehaul.runtime import clock, deadline
from tracehaul.runtime.log import Log
from tracehaul.wire.errors import ClusterError, PeerLost, TimedOut
from tracehaul.wire.hashing import token_array
from tracehaul.wire.steps import DecodeStep, PrefillStep

log = Log(__name__)

ABORT_TIMEOUT_S = 2.0
ABORT_AGAIN_S = 0.3
DUE_AFTER = 1.0
"""A prompt is due so many times as long after it came as it is expected to take: a running trace's next few tokens do
not wait for a new trace's thousands, and those do not wait for ever."""
END_TIMEOUT_S = 1.0
"""For what a server still has to say when an answer is complete."""
TOKEN_S = 1.0
"""The longest that a token may take where they all come at once."""


class Generating:
    """What sends steps to one server."""

    def __init__(
        self, server: StockServer, dialect: Dialect, facts: Facts, watch: Watch, config: AdapterConfig
    ) -> None:
        self._server = server
        self._dialect = dialect
        self.facts = facts
        self._watch = watch
        self._config = config
        self._aborts: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        """Wait for the aborts under way, at most their timeout."""
        await asyncio.gather(*self._aborts)

    def ask(
        self, step: DecodeStep | PrefillStep, packed: bytes, emitted: int, *, max_tokens: int, missing: int = 0
    ) -> Ask:
        """For at most ``max_tokens`` more after ``packed``, of which the last ``emitted`` are the step's output and
        ``missing`` are expected to be computed."""
        tokens = token_array(packed).tolist()
        return Ask(
            rid=f"{step.step}-{secrets.token_hex(4)}",  # a step may come twice, and its first life not be over
            trace=step.trace,
            tokens=tokens,
            prompt_tokens=len(tokens) - emitted,
            max_new=min(max_tokens, max(1, self.facts.context_max - len(tokens))),
            min_new=min(max_tokens, max(0, step.sampling.min_tokens - emitted)),
            sampling=step.sampling,
            salt=step.salt,
            priority=step.priority,
            due_s=clock.now_s() + DUE_AFTER * missing * self._watch.pace.rates.token_s,
            prompt_logprobs=step.prompt_logprobs if isinstance(step, DecodeStep) else None,
        )

    async def run(self, ask: Ask, deadline_s: float | None) -> AsyncGenerator[Chunk, None]:
        """What the server tells, up to its end. Closing the generator aborts the request there.

        After an event with :attr:`Chunk.finish` only figures follow, for a second at most.

        Raises:
            DeadlineExceeded: the deadline has passed.
            PeerLost: the server is lost; TimedOut: it is silent; ClusterError: it refuses, fails, or talks nonsense.
        """
        request, reader = self._dialect.request(ask, self.facts), self._dialect.reader(ask)
        # One body comes when all of it is computed: that takes as long as its tokens do.
        silence_s = self._config.silence_timeout_s + (0.0 if request.streams else ask.max_new * TOKEN_S)
        sent = told = ended = finished = False
        try:
            with self._watch.waiting() as waits:
                async with aclosing(self._server.events(request)) as events:
                    while True:
                        sent = True
                        with waits:
                            data = await self._next(events, deadline_s, silence_s, finished=finished)
                        if data is None:
                            ended = True
                            break
                        told = True
                        chunk = reader.read(data)
                        finished = finished or chunk.finish is not None
                        yield chunk
            if not finished:
                raise PeerLost("the engine's server ended an answer without saying why")
        finally:
            if sent and not ended:
                self._abort(ask.rid, again=not told)

    async def _next(
        self, events: AsyncGenerator[bytes, None], deadline_s: float | None, silence_s: float, *, finished: bool
    ) -> bytes | None:
        """One timer for all that may end the wait: it is set for each token."""
        now_s = clock.now_s()
        until_s = now_s + (END_TIMEOUT_S if finished else silence_s)
        late = deadline_s is not None and deadline_s < until_s
        try:
            async with asyncio.timeout_at(deadline_s if late else until_s):
                return await anext(events, None)
        except TimeoutError as error:
            if finished:
                return None  # it is complete
            if late:
                raise deadline.exceeded() from None
            raise TimedOut(f"no token came for {silence_s:.0f} s") from error
        except ClusterError:
            if finished:
                return None
            raise

    def _abort(self, rid: str, *, again: bool) -> None:
        """``again``: the server may not know the request yet, which came another way."""
        request = self._dialect.abort(rid)
        if request is None or self._watch.fault:
            return

        async def abort() -> None:
            began_s = clock.now_s()
            try:
                await self._server.post(request, ABORT_TIMEOUT_S)
                if again:
                    await asyncio.sleep(ABORT_AGAIN_S)
                    await self._server.post(request, ABORT_TIMEOUT_S)
            except ClusterError as error:
                log.warning("a step was not aborted", rid=rid, reason=error, seconds=clock.now_s() - began_s)

        task = asyncio.create_task(abort(), name=f"abort {rid}")
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)
