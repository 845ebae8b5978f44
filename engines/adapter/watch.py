"""Whether a server is there, and what its load is; when it is lost, everybody who waits for it is told."""

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager

from engines.adapter.config import AdapterConfig
from engines.adapter.dialect import Dialect, Facts, Figures
from engines.adapter.pace import Pace
from engines.adapter.server import StockServer
from tracehaul.runtime import clock
from tracehaul.runtime.interruptible import Interruptible
from tracehaul.runtime.log import Log, Seldom
from tracehaul.wire.errors import ClusterError, PeerLost

log = Log(__name__)
seldom = Seldom(log)

LOADS_EVERY = 2
"""Looks at whether it lives: a page of metrics is long."""
DEEP_EVERY = 10
"""The same: an idle engine computes a token for each."""


class ServerLost(Exception):
    """A server that its worker started is gone, and so is the worker."""


class Watch:
    """Of one server; :meth:`run` must run beside its steps. ``facts`` are those that it was taken on with."""

    def __init__(
        self, server: StockServer, dialect: Dialect, facts: Facts, config: AdapterConfig, on_lost: Callable[[], None]
    ) -> None:
        self._server = server
        self._dialect = dialect
        self._facts = facts
        self._config = config
        self._on_lost = on_lost
        self._waits: dict[Interruptible, None] = {}
        self._fault = ""
        self._down_s: float | None = None
        self.figures = Figures()
        self.pace = Pace()
        self.losses = 0

    @property
    def fault(self) -> str:
        """Why it cannot serve; empty while it can."""
        return self._fault

    @property
    def down_s(self) -> float:
        """For how long it has been lost; 0 while it is there."""
        return 0.0 if self._down_s is None else clock.now_s() - self._down_s

    @contextmanager
    def waiting(self) -> Generator[Interruptible]:
        """Waits for it, which end with PeerLost when it is lost. Raises PeerLost if it is."""
        if self._fault:
            raise PeerLost(self._fault)
        waits = Interruptible()
        self._waits[waits] = None
        try:
            yield waits
        finally:
            del self._waits[waits]

    async def run(self) -> None:
        """Look after it, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._look())
            if self._dialect.deep_path is not None:
                group.create_task(self._look_deep(self._dialect.deep_path))

    def lost(self, why: str) -> None:
        """All its steps end."""
        if not self._fault:
            self.losses += 1
            self._down_s = clock.now_s()
            log.warning("the engine's server is lost", url=self._server.url, why=why, steps=len(self._waits))
            self._on_lost()
        self._fault = why
        for waits in list(self._waits):
            waits.interrupt(PeerLost(why))

    async def _look(self) -> None:
        looks = 0
        while True:
            try:
                await self._server.get(self._dialect.alive_path, self._config.answer_timeout_s)
                if self._fault:
                    await self._take_back()
            except ClusterError as error:
                self.lost(str(error))
            else:
                if looks % LOADS_EVERY == 0:
                    await self._read_load()
            looks += 1
            await asyncio.sleep(self._config.poll_s)

    async def _read_load(self) -> None:
        try:
            answer = await self._server.get(self._dialect.load_path, self._config.answer_timeout_s)
            self.figures = self._dialect.figures(answer)
        except ClusterError as error:
            seldom.warning("a server does not say its load", about=self._server.url, reason=str(error))
            return
        self.pace.look(self.figures)

    async def _take_back(self) -> None:
        """It answers again. Raises ClusterError unless it is what it was, and computes."""
        if self._dialect.deep_path is not None:
            await self._server.get(self._dialect.deep_path, self._config.stall_timeout_s)
        facts = await known(self._server, self._dialect, self._config.answer_timeout_s)
        if (facts.model, facts.path, facts.context_max) != (
            self._facts.model,
            self._facts.path,
            self._facts.context_max,
        ):
            raise PeerLost(f"{self._server.url} serves {facts.model!r} now, and not {self._facts.model!r} as before")
        log.info("the engine's server is back", url=self._server.url, down_s=self.down_s)
        self._fault, self._down_s = "", None

    async def _look_deep(self, path: str) -> None:
        """A server may say that it does not compute when it only takes long to: for how long it says so counts, and
        has computed nothing of any prompt."""
        well_s, computed = clock.now_s(), self.figures.prefill_tokens
        while True:
            await asyncio.sleep(self._config.poll_s * DEEP_EVERY)
            if self._fault:
                well_s = clock.now_s()
                continue
            try:
                await self._server.get(path, self._config.stall_timeout_s)
                well_s = clock.now_s()
            except ClusterError as error:
                if self.figures.prefill_tokens != computed:
                    well_s, computed = clock.now_s(), self.figures.prefill_tokens
                if clock.now_s() - well_s >= self._config.stall_timeout_s:
                    self.lost(f"its engine does not compute: {error}")


async def known(server: StockServer, dialect: Dialect, timeout_s: float) -> Facts:
    """What the server is.

    Raises:
        ClusterError: it does not say.
    """
    return dialect.facts([await server.get(path, timeout_s) for path in dialect.fact_paths])
