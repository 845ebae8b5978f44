"""What is on its way to receivers: kept until it was taken, sent beside everything else.

Each receiver has a task of its own, so that one that is dead, slow or lies holds up nobody but itself.
"""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol
from urllib.parse import urlsplit

import msgspec
from blake3 import blake3

from jobs.webhooks.deliveries import Breaker, Delivered, Delivery, Failed, Outcome, retried, sooner
from jobs.webhooks.events import Event, Kind
from jobs.webhooks.kept import Kept
from records.base import RecordsLost
from records.documents import Documents
from tracehaul.runtime import clock
from tracehaul.runtime.log import Log, Seldom
from tracehaul.runtime.tasks import Tasks

log = Log(__name__)
seldom = Seldom(log)

AT_ONCE = 4
"""Attempts at one receiver."""
WAITING_MAX = 10_000
"""Events for one receiver; beyond it the oldest are given up."""
AGE_S = 3 * 86_400
"""What is older is given up, whatever happened; for as long it is known that an event was taken."""
KNOWN_MAX = 100_000
"""Of each receiver, at most."""
NEWS_S = 86_400
"""What ended longer ago is told nobody."""
TRIM_S = 3600.0
FLUSH_S = 2.0
AGAIN_S = 5.0
"""After the database refused."""
ADOPT_S = 2.0
"""So often it is looked what other routers have left."""


class Receiver(msgspec.Struct, frozen=True):
    """One address, and what it is told."""

    url: str
    kinds: Collection[Kind]
    tenant: str | None
    """Whose events alone; None: everybody's."""

    @property
    def host(self) -> str:
        """As it is shown: the rest of an address may be a secret."""
        return urlsplit(self.url).netloc

    @property
    def name(self) -> str:
        """What is on its way there is kept under this."""
        return blake3(self.url.encode()).hexdigest(16)

    def wants(self, event: Event) -> bool:
        """Whether it is told of that."""
        return event.kind in self.kinds and self.tenant in (None, event.tenant)


class Sender(Protocol):
    """Takes an event there."""

    async def send(self, receiver: Receiver, event: str, body: str) -> Outcome:
        """One attempt, which ends by itself; ``event``: its name. Never raises for what a receiver does."""
        ...


class WebhookStats(msgspec.Struct):
    """Counts of all receivers."""

    sent: int = 0
    failed: int = 0
    given_up: int = 0
    not_kept: int = 0


class _Way:
    """To one receiver."""

    def __init__(self, receiver: Receiver, kept: Kept) -> None:
        self.receiver = receiver
        self.kept = kept
        self.begun_s = 0.0
        """It is told of nothing that ended before: that is when it was named first."""
        self.breaker = Breaker()
        self.waiting: dict[str, Delivery] = {}
        """By event, the oldest first."""
        self.unkept: set[str] = set()
        """Of those, what the database does not have: nobody else tells of it."""
        self.sending: set[str] = set()
        self.wake = asyncio.Event()
        self.known = asyncio.Event()
        """What former lives left is."""
        self.left = True
        """The database may have what is not known here."""


class Outbox:
    """All receivers'.

    Args:
        receivers: who is told.
        documents: where it is kept.
        router: whose it is there.
        sender: takes it there.
        stats: counts.
        dice: spreads attempts.
        wall_s: what time it is.
        shared: other routers keep theirs beside it.
    """

    def __init__(
        self,
        receivers: Sequence[Receiver],
        documents: Documents,
        router: str,
        sender: Sender,
        stats: WebhookStats,
        dice: random.Random,
        wall_s: Callable[[], float] = clock.wall_s,
        *,
        shared: bool = False,
    ) -> None:
        self._shared = shared
        self._sender = sender
        self._stats = stats
        self._dice = dice
        self._wall_s = wall_s
        self._made_s = wall_s()
        """Before anything can end; whenever the database says who was named before."""
        self._ways = [_Way(receiver, Kept(documents, receiver.name, router, shared=shared)) for receiver in receivers]
        self._news: deque[Event] = deque(maxlen=WAITING_MAX)
        self._noted, self._idle = asyncio.Event(), asyncio.Event()

    @property
    def waiting(self) -> Mapping[str, int]:
        """Events on their way, by receiver."""
        return _summed((way.receiver.host, len(way.waiting)) for way in self._ways)

    @property
    def broken(self) -> Mapping[str, int]:
        """How many of a receiver's addresses are told nothing for now."""
        return _summed((way.receiver.host, way.breaker.open) for way in self._ways)

    def note(self, event: Event) -> None:
        """It is told soon, once however often it is noted, unless it is old."""
        if event.at < self._wall_s() - NEWS_S:
            return
        if len(self._news) == WAITING_MAX:
            oldest = self._news[0]
            self._stats.given_up += 1
            seldom.warning("webhook: too many ends are to be told, the oldest is given up", named=oldest.name)
        self._news.append(event)
        self._noted.set()

    async def flushed(self) -> None:
        """What was noted is kept, if that can be soon."""
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                while self._news:
                    self._idle.clear()
                    await self._idle.wait()

    async def run(self) -> None:
        """Send what waits, what former lives of this router left, and what routers left that are gone, until it is
        cancelled."""
        async with Tasks("webhooks") as tasks:
            for way in self._ways:
                tasks.start(self._recover(way), f"{way.receiver.host} of before")
                tasks.start(self._serve(way, tasks), way.receiver.host)
            tasks.start(self._telling(), "telling")
            tasks.start(self._trimming(), "trimming")
            await tasks.crash()

    # --- how ------------------------------------------------------------------------------------------------

    async def _telling(self) -> None:
        while True:
            await self._noted.wait()
            self._noted.clear()
            while self._news:
                event = self._news[0]
                for way in self._ways:
                    await self._tell(way, event)
                if self._news[0] is event:  # else there was no more room for it meanwhile
                    self._news.popleft()
            self._idle.set()

    async def _tell(self, way: _Way, event: Event) -> None:
        if not way.receiver.wants(event) or event.name in way.waiting:
            return
        await way.known.wait()
        if event.at < int(way.begun_s):
            return
        try:
            if await way.kept.knows(event.name):
                return
            await self._adopt(way)
            # It may have gone from a router that was asked about later to one before.
            if self._shared and await way.kept.knows(event.name):
                return
        except RecordsLost:
            pass  # twice is better than never
        now_s = self._wall_s()
        delivery = Delivery(event.name, event.body(), now_s, now_s)
        await self._keep(way, delivery)
        way.waiting[delivery.event] = delivery
        way.wake.set()
        if len(way.waiting) > WAITING_MAX:
            oldest = next(name for name in way.waiting if name not in way.sending)
            self._stats.given_up += 1
            log.warning("webhook: too many events wait, the oldest is given up", to=way.receiver.host, named=oldest)
            await self._done(way, way.waiting[oldest])

    async def _trimming(self) -> None:
        while True:
            try:
                for way in self._ways:
                    await way.kept.trim(int((self._wall_s() - AGE_S) * 1e6), KNOWN_MAX)
            except RecordsLost as error:
                log.warning("webhook: old events are not forgotten yet", why=error)
            await asyncio.sleep(TRIM_S)

    async def _serve(self, way: _Way, tasks: Tasks) -> None:
        while True:
            now_s = self._wall_s()
            places = way.breaker.places(clock.now_s(), AT_ONCE) - len(way.sending)
            due = [d for d in way.waiting.values() if d.event not in way.sending and d.due_s <= now_s]
            for delivery in due[: max(0, places)]:
                way.sending.add(delivery.event)
                tasks.start(self._attempt(way, delivery), delivery.event)
            way.wake.clear()
            try:
                async with asyncio.timeout(self._pause_s(way, now_s)):
                    await way.wake.wait()
            except TimeoutError:
                pass

    def _pause_s(self, way: _Way, now_s: float) -> float | None:
        """Until there may be something to do; None: somebody will say so."""
        resting = [d.due_s for d in way.waiting.values() if d.event not in way.sending]
        if not resting or way.breaker.gone or len(way.sending) >= AT_ONCE:
            return None
        pause_s = max(0.0, min(resting) - now_s)
        if (opens_s := way.breaker.opens_s()) is not None:
            if way.sending:
                return None
            pause_s = max(pause_s, opens_s - clock.now_s())
        return max(pause_s, 0.001)

    async def _attempt(self, way: _Way, delivery: Delivery) -> None:
        try:
            if not await self._may(way, delivery):
                return
            outcome = await self._sender.send(way.receiver, delivery.event, delivery.body)
            was = way.breaker.open
            way.breaker.heard(outcome, clock.now_s())
            if way.breaker.open != was:
                state = "nobody is told there for now" if way.breaker.open else "events are taken there again"
                log.warning(f"webhook: {state}", to=way.receiver.host)
            if isinstance(outcome, Delivered):
                self._stats.sent += 1
                await self._done(way, delivery)
            else:
                await self._failed(way, delivery, outcome)
        finally:
            way.sending.discard(delivery.event)
            way.wake.set()

    async def _may(self, way: _Way, delivery: Delivery) -> bool:
        """No other router has it by now: this one may have stood still. Where that cannot be asked it waits."""
        if delivery.event in way.unkept:
            return True
        try:
            mine = await way.kept.has(delivery.event)
        except RecordsLost as error:
            seldom.warning("webhook: events wait until it can be asked whose they are", why=error)
            way.waiting[delivery.event] = msgspec.structs.replace(delivery, due_s=self._wall_s() + AGAIN_S)
            return False
        if not mine:
            way.waiting.pop(delivery.event, None)
        return mine

    async def _failed(self, way: _Way, delivery: Delivery, failed: Failed) -> None:
        self._stats.failed += 1
        later = retried(delivery, failed, self._wall_s(), self._dice)
        facts = {"to": way.receiver.host, "named": delivery.event, "why": failed.why}
        if later is None:
            self._stats.given_up += 1
            log.warning("webhook: an event is given up", attempts=delivery.attempts + 1, **facts)
            await self._done(way, delivery)
            return
        log.warning("webhook: an event was not taken", again_in_s=round(later.due_s - self._wall_s()), **facts)
        way.waiting[later.event] = later
        if later.event in way.unkept:
            await self._keep(way, later)
            return
        try:
            if not await way.kept.later(later):
                way.waiting.pop(later.event, None)  # it is another router's by now
        except RecordsLost as error:
            log.warning("webhook: an attempt is not kept: a restart may make it anew", named=later.event, why=error)

    async def _keep(self, way: _Way, delivery: Delivery) -> None:
        try:
            await way.kept.put(delivery)
        except RecordsLost as error:
            way.unkept.add(delivery.event)
            self._stats.not_kept += 1
            log.warning("webhook: an event is not kept: a restart may forget it", named=delivery.event, why=error)
        else:
            way.unkept.discard(delivery.event)

    async def _done(self, way: _Way, delivery: Delivery) -> None:
        """It is on its way no more; that it was is known for a while."""
        way.waiting.pop(delivery.event, None)
        new = delivery.event in way.unkept
        way.unkept.discard(delivery.event)
        try:
            await way.kept.over(delivery, new=new)
        except RecordsLost as error:
            log.warning("webhook: a restart may tell of an event again", named=delivery.event, why=error)

    async def _recover(self, way: _Way) -> None:
        """What was left of former lives, however long it takes to be known; then what other routers leave."""
        while True:
            try:
                await self._adopt(way)
                if way.left:
                    way.left = False
                    await self._find(way)
                if not self._shared:
                    return
                await asyncio.sleep(ADOPT_S)
            except RecordsLost as error:
                seldom.warning("webhook: events of before are not known yet", to=way.receiver.host, why=error)
                way.known.set()  # what happens now is told meanwhile
                way.left = True
                await asyncio.sleep(AGAIN_S)

    async def _adopt(self, way: _Way) -> bool:
        """Whether there was anything that routers had which live no more. Raises RecordsLost: nobody knows."""
        try:
            found = await way.kept.adopt()
        except RecordsLost:
            way.left = True
            raise
        way.left = way.left or bool(found)
        return bool(found)

    async def _find(self, way: _Way) -> None:
        """What the database has to be sent by this router. Raises RecordsLost."""
        began_s = await way.kept.begun(int(self._made_s * 1e6)) / 1e6
        way.begun_s = min(began_s, self._made_s)  # the clock may have been put back
        found, mark = await way.kept.page(None)
        while mark is not None:
            for delivery in found:
                way.waiting.setdefault(delivery.event, sooner(delivery, self._wall_s()))
            found, mark = await way.kept.page(mark)
        way.known.set()
        way.wake.set()


def _summed(counts: Iterable[tuple[str, int]]) -> Mapping[str, int]:
    total: Counter[str] = Counter()
    for name, count in counts:
        total[name] += count
    return total
