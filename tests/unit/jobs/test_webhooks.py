"""What is told, when it is told again, and when it is given up; and the outbox, with a sender that is scripted."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.webhooks import outbox as rooms
from jobs.webhooks.deliveries import (
    BREAK_AFTER,
    PROBES_S,
    RETRIES_S,
    Breaker,
    Delivered,
    Delivery,
    Failed,
    Outcome,
    retried,
    sooner,
)
from jobs.webhooks.events import KINDS, Event, kind_of
from jobs.webhooks.kept import KIND
from jobs.webhooks.outbox import Outbox, Receiver, WebhookStats
from records.documents import Document, Shelf
from records.fakes import MemoryDocuments

NO = Failed("no")
NOW = 1_700_000_000
EVENT = Event("batch.completed", "red", "batch_1", NOW)


def test_an_event_is_told_in_openais_words_and_has_one_name() -> None:
    told = json.loads(EVENT.body())
    assert told == {
        "id": EVENT.name, "object": "event", "created_at": NOW, "type": "batch.completed", "data": {"id": "batch_1"},
    }  # fmt: skip
    assert EVENT.name == msgspec.structs.replace(EVENT, at=NOW + 9).name
    others = [Event(kind, tenant, subject, NOW) for kind in KINDS for tenant in ("", "red") for subject in ("a", "b")]
    assert len({event.name for event in others}) == len(others)
    assert kind_of("batch", "completed") == "batch.completed"
    assert [kind_of("batch", "in_progress"), kind_of("response", "queued"), kind_of("response", "expired")] == [
        None
    ] * 3


def test_it_is_told_again_for_a_day_and_then_given_up() -> None:
    delivery: Delivery | None = Delivery("e", "{}", NOW, NOW)
    now_s, waits = float(NOW), []
    while (delivery := retried(delivery, NO, now_s, random.Random(7))) is not None:
        waits.append(delivery.due_s - now_s)
        now_s = delivery.due_s
    assert len(waits) == len(RETRIES_S)
    assert all(0.9 * wait <= was <= 1.1 * wait for wait, was in zip(RETRIES_S, waits, strict=True))
    assert 20 * 3600 < now_s - NOW < 27 * 3600


def test_what_a_receiver_asks_for_is_heeded_within_reason() -> None:
    delivery = Delivery("e", "{}", NOW, NOW)
    assert (retried(delivery, Failed("", 120.0), NOW, random.Random(1)) or delivery).due_s == NOW + 120
    assert (retried(delivery, Failed("", 1e9), NOW, random.Random(1)) or delivery).due_s == NOW + 3600
    assert retried(delivery, Failed("", gone=True), NOW, random.Random(1)) is None


def test_a_clock_that_was_put_back_delays_nothing_for_longer_than_it_could() -> None:
    late = Delivery("e", "{}", NOW, NOW + 1e9)
    assert sooner(late, NOW).due_s <= NOW + 1.1 * 28_800
    assert sooner(late, NOW + 1e9) == late


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 4000)), max_size=60))
def test_a_breaker_opens_after_failures_in_a_row_and_closes_by_one_that_was_taken(
    said: list[tuple[bool, float]],
) -> None:
    breaker, failures, now_s = Breaker(), 0, 0.0
    for taken, waits_s in said:
        now_s += waits_s
        breaker.heard(Delivered() if taken else NO, now_s)
        failures = 0 if taken else failures + 1
        assert breaker.open == (failures >= BREAK_AFTER)
        if breaker.open:
            rest_s = PROBES_S[min(failures - BREAK_AFTER, len(PROBES_S) - 1)]
            assert breaker.opens_s() == now_s + rest_s
            assert (breaker.places(now_s + 0.99 * rest_s, 4), breaker.places(now_s + rest_s, 4)) == (0, 1)
        else:
            assert breaker.places(now_s, 4) == 4


def test_who_wants_no_more_is_left_alone() -> None:
    breaker = Breaker()
    breaker.heard(Failed("410", gone=True), 0)
    assert breaker.open
    assert breaker.places(1e12, 4) == 0


# --- the outbox -----------------------------------------------------------------------------------------------

ALL = Receiver("https://a.example/hook?key=hidden", KINDS, None)


class Scripted:
    """Answers as it is told to, the last answer again and again; keeps what it was asked."""

    def __init__(self, *outcomes: Outcome) -> None:
        self.outcomes = list(outcomes)
        self.asked: list[tuple[str, str]] = []
        self.changed = asyncio.Event()
        self.hang: set[str] = set()

    async def send(self, receiver: Receiver, event: str, body: str) -> Outcome:
        self.asked.append((receiver.url, event))
        self.changed.set()
        if receiver.url in self.hang:
            await asyncio.Event().wait()
        return self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.asked) < count:
                self.changed.clear()
                await self.changed.wait()
        await asyncio.sleep(0.01)


class World:
    """An outbox that outlives its lives, with a clock of its own."""

    def __init__(self, *receivers: Receiver) -> None:
        self.receivers: Sequence[Receiver] = receivers or (ALL,)
        self.documents, self.stats = MemoryDocuments(), WebhookStats()
        self.now_s = float(NOW)

    def live(self, sender: Scripted, use: Callable[[Outbox], Awaitable[None]]) -> None:
        async def main() -> None:
            box = Outbox(self.receivers, self.documents, "r", sender, self.stats, random.Random(1), lambda: self.now_s)
            running = asyncio.create_task(box.run())
            try:
                async with asyncio.timeout(20):
                    await asyncio.sleep(0.01)
                    await use(box)
            finally:
                running.cancel()
                await asyncio.wait([running])

        asyncio.run(main())

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Names and states of what is kept on the way."""
        shelves = [kept for shelf, kept in self.documents.kept.items() if shelf.kind.startswith(f"{KIND}/")]
        return sorted((doc.name, doc.tags["state"]) for kept in shelves for doc in kept.values())


def test_each_is_told_once_to_whoever_wants_it_however_often_it_is_noted() -> None:
    own = Receiver("https://b.example/", ("batch.failed",), None)
    blue = Receiver("https://c.example/", KINDS, "blue")
    world, sender = World(ALL, own, blue), Scripted(Delivered())

    async def use(box: Outbox) -> None:
        for _ in range(3):
            box.note(EVENT)
        await sender.until(1)
        box.note(EVENT)
        box.note(msgspec.structs.replace(EVENT, subject="old", at=NOW - 86_401))
        box.note(Event("batch.failed", "blue", "batch_2", NOW))
        await sender.until(4)
        assert box.waiting == {"a.example": 0, "b.example": 0, "c.example": 0}

    world.live(sender, use)
    failed = Event("batch.failed", "blue", "batch_2", NOW).name
    assert sender.asked[0] == (ALL.url, EVENT.name)
    assert sorted(sender.asked[1:]) == sorted((each.url, failed) for each in (ALL, own, blue))
    assert world.stats == WebhookStats(sent=4)
    world.live(again := Scripted(Delivered()), lambda box: _noted(box, EVENT))
    assert again.asked == [], "what was taken is known in the next life, too"


async def _noted(box: Outbox, *events: Event) -> None:
    for event in events:
        box.note(event)
    await asyncio.sleep(0.05)


def test_what_was_not_taken_is_told_by_the_next_life_when_it_is_due() -> None:
    world = World()
    world.live(sender := Scripted(NO), lambda box: _noted(box, EVENT))
    assert (len(sender.asked), world.rows) == (1, [(EVENT.name, "waits")])
    world.live(early := Scripted(Delivered()), lambda box: _noted(box))
    assert early.asked == [], "not before it is due"
    world.now_s += 6
    world.live(sender := Scripted(Delivered()), lambda box: _noted(box))
    assert sender.asked == [(ALL.url, EVENT.name)]
    assert world.rows == [(EVENT.name, "taken")]
    world.now_s += rooms.AGE_S + 10
    world.live(Scripted(Delivered()), lambda box: _noted(box))
    assert world.rows == []


def test_a_life_that_ends_while_it_sends_loses_nothing() -> None:
    world = World()
    sender = Scripted(Delivered())
    sender.hang.add(ALL.url)
    world.live(sender, lambda box: _noted(box, EVENT))
    assert world.rows == [(EVENT.name, "waits")]
    world.live(sender := Scripted(Delivered()), lambda box: _noted(box))
    assert sender.asked == [(ALL.url, EVENT.name)]


def test_what_was_noted_last_is_kept_before_the_end() -> None:
    world, sender = World(), Scripted(Delivered())
    sender.hang.add(ALL.url)
    events = [msgspec.structs.replace(EVENT, subject=f"b{at}") for at in range(50)]

    async def use(box: Outbox) -> None:
        for event in events:
            box.note(event)
        await box.flushed()

    world.live(sender, use)
    assert world.rows == sorted((event.name, "waits") for event in events)


def test_a_receiver_is_not_told_of_what_ended_before_it_was_named() -> None:
    world = World()
    world.live(sender := Scripted(Delivered()), lambda box: _noted(box, msgspec.structs.replace(EVENT, at=NOW - 60)))
    assert sender.asked == []


def test_a_receiver_is_told_of_what_ends_while_the_database_is_opened_for_the_first_time() -> None:
    """That takes seconds on a busy machine, and a batch may take less."""
    opened = asyncio.Event()

    class Opening(MemoryDocuments):
        async def get(self, shelf: Shelf, name: str) -> Document | None:
            await opened.wait()
            return await super().get(shelf, name)

    world, sender = World(), Scripted(Delivered())
    world.documents = Opening()

    async def use(box: Outbox) -> None:
        box.note(msgspec.structs.replace(EVENT, at=NOW + 1))
        world.now_s += 3
        opened.set()
        await sender.until(1)

    world.live(sender, use)
    assert sender.asked == [(ALL.url, EVENT.name)]


def test_a_clock_that_was_put_back_hides_nothing_that_ends_then() -> None:
    world = World()
    world.live(Scripted(Delivered()), _noted)
    world.now_s -= 3600
    late = msgspec.structs.replace(EVENT, at=NOW - 3590)
    world.live(sender := Scripted(Delivered()), lambda box: _noted(box, late))
    assert sender.asked == [(ALL.url, EVENT.name)]


def test_one_that_hangs_holds_up_nobody_else() -> None:
    slow, quick = Receiver("https://slow.example/", KINDS, None), Receiver("https://quick.example/", KINDS, None)
    world, sender = World(slow, quick), Scripted(Delivered())
    sender.hang.add(slow.url)
    events = [msgspec.structs.replace(EVENT, subject=f"b{at}") for at in range(20)]

    async def use(box: Outbox) -> None:
        for event in events:
            box.note(event)
        await sender.until(20 + rooms.AT_ONCE)
        assert box.waiting == {"slow.example": 20, "quick.example": 0}

    world.live(sender, use)
    assert sum(url == slow.url for url, _ in sender.asked) == rooms.AT_ONCE


def test_a_dead_receiver_breaks_and_is_told_all_once_it_lives() -> None:
    world, dead = World(), Scripted(NO)
    events = [msgspec.structs.replace(EVENT, subject=f"b{at}") for at in range(BREAK_AFTER + 5)]

    async def use(box: Outbox) -> None:
        await _noted(box, *events)
        assert box.broken == {"a.example": 1}
        assert BREAK_AFTER <= len(dead.asked) < BREAK_AFTER + rooms.AT_ONCE
        before = len(dead.asked)
        world.now_s += 30
        await _noted(box, msgspec.structs.replace(EVENT, subject="new"))
        assert len(dead.asked) == before, "nobody is asked while it is open"

    world.live(dead, use)
    world.now_s += 3600
    world.live(alive := Scripted(Delivered()), lambda box: alive.until(BREAK_AFTER + 6))
    assert len({event for _, event in alive.asked}) == BREAK_AFTER + 6
    assert {state for _, state in world.rows} == {"taken"}


def test_a_database_that_is_away_costs_no_event_of_this_life() -> None:
    world, sender = World(), Scripted(NO, Delivered())

    async def use(box: Outbox) -> None:
        world.documents.lost = "away"
        box.note(EVENT)
        await sender.until(1)
        world.now_s += 6
        box.note(msgspec.structs.replace(EVENT, subject="other"))
        await sender.until(3)

    world.live(sender, use)
    assert [event for _, event in sender.asked].count(EVENT.name) == 2
    assert (world.stats.sent, world.stats.not_kept) == (2, 3)


def test_a_database_that_is_away_at_first_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "AGAIN_S", 0.02)
    world = World()
    world.live(Scripted(NO), lambda box: _noted(box, EVENT))
    world.now_s += 6
    world.documents.lost = "away"
    sender = Scripted(Delivered())

    async def use(box: Outbox) -> None:
        box.note(msgspec.structs.replace(EVENT, subject="other"))
        await sender.until(1)
        world.documents.lost = None
        await sender.until(2)

    world.live(sender, use)
    assert sender.asked[1] == (ALL.url, EVENT.name)


def test_beyond_what_may_wait_the_oldest_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "WAITING_MAX", 10)
    world, sender = World(), Scripted(Delivered())
    sender.hang.add(ALL.url)
    events = [msgspec.structs.replace(EVENT, subject=f"b{at}") for at in range(15)]

    async def use(box: Outbox) -> None:
        for at in range(0, 15, 5):
            await _noted(box, *events[at : at + 5])
        assert box.waiting == {"a.example": 10}

    world.live(sender, use)
    assert world.stats.given_up == 5
    waits = {name for name, state in world.rows if state == "waits"}
    assert {event.name for event in events[9:]} <= waits


def test_news_that_nobody_has_room_for_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "WAITING_MAX", 10)
    world = World()
    box = Outbox(
        world.receivers, world.documents, "r", Scripted(Delivered()), world.stats, random.Random(1), lambda: NOW
    )
    for at in range(14):  # nobody takes them: the database is away, say
        box.note(msgspec.structs.replace(EVENT, subject=f"b{at}"))
    assert world.stats.given_up == 4


def test_what_it_is_shown_as_has_no_secret() -> None:
    assert ALL.host == "a.example"
