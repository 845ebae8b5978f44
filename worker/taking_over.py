"""Steps that begin with what an earlier router was told of them, around the service that runs them."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from msgspec.structs import replace

from tracehaul.runtime import clock
from tracehaul.wire.answers import answer_name
from tracehaul.wire.hashing import salted, token_count
from tracehaul.wire.messages import Reply
from tracehaul.wire.steps import DecodeStep, Tokens
from worker.orphans import Orphans, Said

ENDING_S = 5.0
"""So long a step is waited for that is being closed, as its router is lost."""


class Taken:
    """A step, with what was said of it before."""

    def __init__(self, request: DecodeStep, said: Said | None) -> None:
        self.request = request
        """As it is to be run: behind what was said."""
        self.told: list[Reply] = []
        """To be told first."""
        self.over = False
        """That is all of it."""
        self.said = said
        """By its end; to be set by who runs it. None: nothing, or nobody is to have it."""
        self.tokens_again = 0
        """How many of ``told`` are tokens."""
        if said is None:
            return
        more = said.packed[len(request.emitted) :]
        self.tokens_again = token_count(more)
        if more:
            self.told.append(Tokens(more, said.usage))
        if said.done is not None:
            self.told.append(said.done)
            self.over = True
        self.request = replace(request, emitted=said.packed)


class TakingOver:
    """One decode worker's."""

    def __init__(self) -> None:
        self._orphans = Orphans()
        self._running: dict[bytes, tuple[str, asyncio.Task[object], asyncio.Event]] = {}
        self._new = asyncio.Event()

    @asynccontextmanager
    async def of(self, request: DecodeStep, peer: str, *, goes_on: bool = True) -> AsyncGenerator[Taken]:
        """A step that a router asks for, by its connection.

        ``goes_on``: an answer of it that has begun can be gone on with here. Logprobs are not kept: of a step that
        tells them nothing is.
        """
        if request.sampling.logprobs is not None or request.prompt_logprobs is not None:
            yield Taken(request, None)
            return
        name = answer_name(salted(request.root, request.salt), request.prompt, request.sampling)
        await self._ending(name, peer)
        said = self._orphans.find(name, peer, request.emitted, clock.now_s())
        taken = Taken(request, said if said is None or goes_on or said.reason is not None else None)
        task, ended = asyncio.current_task(), asyncio.Event()
        assert task is not None
        self._running[name] = peer, task, ended
        try:
            yield taken
        finally:
            ended.set()
            if self._running.get(name, ("", None, None))[2] is ended:
                del self._running[name]
            if taken.said is not None and taken.said.packed:
                self._orphans.ended(name, peer, taken.said, clock.now_s())

    def lost(self, peer: str) -> None:
        """A router's connection is gone."""
        if self._orphans.lost(peer, clock.now_s()):
            self._new.set()

    def names(self) -> tuple[bytes, ...]:
        """As in :class:`tracehaul.wire.cluster.NodeLoad`."""
        return self._orphans.names(clock.now_s())

    async def news(self) -> None:
        """Wait until there are more of them."""
        await self._new.wait()
        self._new.clear()

    async def _ending(self, name: bytes, peer: str) -> None:
        """A step that has lost its router is about to say what it said."""
        running = self._running.get(name)
        if running is not None and running[0] != peer and running[1].cancelling():
            try:
                async with asyncio.timeout(ENDING_S):
                    await running[2].wait()
            except TimeoutError:
                pass
