"""Calls that their clients have named by an ``Idempotency-Key``: each runs once, whoever reads its answer, and however
often."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from router.calls.admission import Admission
from router.calls.errors import CallFailed, unavailable
from router.http.access import Gate
from router.http.asgi import Headers, Reply
from router.http.config import ApiConfig
from router.http.errors import STATUS
from router.http.idempotency import Entry, Ledger, Name, Rest
from router.http.telling import REQUEST, Telling
from router.http.translate import translate
from router.http.visits import Visit, Visits
from tracehaul.runtime import clock

REPLAYED: Headers = [(b"idempotent-replayed", b"true")]
"""The answer was asked for before."""

Work = Callable[[Telling, Visit], Coroutine[Any, Any, None]]
"""Answers a call to whom it is given."""


class _Carried:
    """One call that runs, and who pays for what it holds when nobody reads it."""

    def __init__(self, entry: Entry[Telling], visit: Visit) -> None:
        self.entry = entry
        self.caller = visit.caller
        self.inside = visit.inside
        """The router asks itself: who leaves does not come back within a grace, and keeps its answer."""
        self.task: asyncio.Task[None] | None = None
        self.alone = False
        """Nobody reads it."""
        self.left = False
        """Who asked first does not."""


class Repeats:
    """All of a router's."""

    def __init__(self, config: ApiConfig, gate: Gate, admission: Admission, visits: Visits) -> None:
        self.ledger: Ledger[Telling] = Ledger(
            config.idempotency_bytes_max, config.idempotency_age_s, config.idempotency_grace_s
        )
        self._gate = gate
        self._admission = admission
        self._visits = visits
        self._carried: dict[Entry[Telling], _Carried] = {}
        """Those that run."""

    async def answer(
        self,
        name: Name,
        call: str,
        reply: Reply,
        visit: Visit,
        has: list[int] | None,
        broken: Callable[[CallFailed], bytes],
        work: Work,
    ) -> None:
        """Answer a call: by what was told of it, or by what is being told, else by ``work``.

        Args:
            name: whose it is, and what it is called.
            call: its fingerprint.
            reply: to whom.
            visit: likewise.
            has: the events that its client has; None: from the beginning.
            broken: how a stream of it fails.
            work: runs it.

        Raises:
            CallFailed: what it fails with; or another call has this name.
        """
        entry = self.ledger.asked(name, call, clock.now_s())
        first = entry is None
        if entry is None:
            entry = self._begin(name, call, visit, broken, work)
        carried = self._carried.get(entry)
        self.ledger.read(entry)
        if carried is not None and carried.alone:
            self._attended(carried)
        try:
            await entry.answer.follow(reply, [] if first else REPLAYED, None if has is None else Rest(has))
        finally:
            self._left(entry, first=first)
            if carried is not None and carried.alone and carried.inside and carried.task is not None:
                await asyncio.wait((carried.task,))  # who asks again at once goes on from what this one has

    def forget(self, tenant: str, trace: str) -> None:
        """What was answered in a trace is told to nobody any more."""
        self.ledger.forget((tenant, trace))

    async def close(self) -> None:
        """End what runs."""
        tasks = [carried.task for carried in self._carried.values() if carried.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @asynccontextmanager
    async def living(self) -> AsyncGenerator[None, None]:
        """As long as the server runs."""
        yield
        await self.close()

    # --- what runs ----------------------------------------------------------------------------------------------

    def _begin(
        self, name: Name, call: str, visit: Visit, broken: Callable[[CallFailed], bytes], work: Work
    ) -> Entry[Telling]:
        telling = Telling(broken)
        telling.headers.append((REQUEST, visit.request.encode()))
        entry = self.ledger.begin(name, call, telling, clock.now_s())
        carried = self._carried[entry] = _Carried(entry, visit)
        carried.task = asyncio.create_task(self._carry(carried, visit, broken, work), name=f"keyed-{call}")
        return entry

    async def _carry(self, carried: _Carried, visit: Visit, broken: Callable[[CallFailed], bytes], work: Work) -> None:
        entry, own = carried.entry, visit.again()
        telling, failure = entry.answer, None
        try:
            await work(telling, own)
            entry.trace = (entry.name[0], own.trace)
            self.ledger.end(entry)
            if carried.inside:
                self.ledger.drop(entry)
        except asyncio.CancelledError:
            failure = unavailable("nobody came back for the answer, or the server is stopping")
        except Exception as error:
            failure = translate(error)
        if failure is not None:
            self.ledger.drop(entry)  # who asks again goes on from what was sampled
        telling.over(failure)
        del self._carried[entry]
        if carried.left:
            self._visits.over(own, 200 if failure is None else STATUS[failure.cause], None)
        else:
            visit.ran_as(own)
        if carried.alone:
            self._attended(carried)
        if failure is None:
            telling.broken = broken  # what told it is not needed any more

    def _left(self, entry: Entry[Telling], *, first: bool) -> None:
        now_s = clock.now_s()
        look_s = self.ledger.left(entry, now_s)
        carried = self._carried.get(entry)
        if carried is None:
            return
        carried.left = carried.left or first
        if look_s is not None:
            carried.alone = True
            self._gate.went_on(carried.caller)
            self._admission.went_on()
            if carried.inside and carried.task is not None:
                carried.task.cancel()
            asyncio.get_running_loop().call_later(look_s - now_s, self._look, carried)

    def _look(self, carried: _Carried) -> None:
        if carried.task is not None and self.ledger.abandoned(carried.entry, clock.now_s()):
            carried.task.cancel()

    def _attended(self, carried: _Carried) -> None:
        carried.alone = False
        self._gate.ended(carried.caller)
        self._admission.over()
