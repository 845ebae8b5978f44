"""Several routers' outboxes over one database: what one that is gone had to send is sent, and once."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from jobs.webhooks import outbox as rooms
from jobs.webhooks.deliveries import Delivered, Outcome
from jobs.webhooks.events import Event
from jobs.webhooks.outbox import Outbox, Receiver, WebhookStats
from records.fakes import MemoryDocuments
from tests.unit.jobs.test_webhooks import ALL, EVENT, NO, NOW, Scripted


async def _noted(box: Outbox, *events: Event) -> None:
    for event in events:
        box.note(event)
    await asyncio.sleep(0.05)


class Routers:
    """Two outboxes over one database, each with its sender."""

    def __init__(self) -> None:
        self.documents = MemoryDocuments()
        self.senders = {"one": Scripted(NO), "two": Scripted(Delivered())}
        self.now_s = float(NOW)
        self.boxes = {name: self.box(name) for name in self.senders}

    def box(self, name: str) -> Outbox:
        dice, stats = random.Random(1), WebhookStats()
        return Outbox([ALL], self.documents, name, self.senders[name], stats, dice, lambda: self.now_s, shared=True)

    def live(self, use: Callable[[], Awaitable[None]]) -> None:
        async def main() -> None:
            running = [asyncio.create_task(box.run()) for box in self.boxes.values()]
            try:
                async with asyncio.timeout(20):
                    await asyncio.sleep(0.01)
                    await use()
            finally:
                for task in running:
                    task.cancel()
                await asyncio.wait(running)

        asyncio.run(main())


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "ADOPT_S", 0.01)
    monkeypatch.setattr(rooms, "AGAIN_S", 0.02)


@pytest.mark.usefixtures("soon")
def test_what_a_router_had_to_send_that_is_gone_is_sent_by_another_and_by_nobody_else() -> None:
    routers = Routers()
    events = [msgspec.structs.replace(EVENT, subject=f"b{at}") for at in range(6)]

    async def use() -> None:
        one, two = routers.senders["one"], routers.senders["two"]
        await _noted(routers.boxes["one"], *events)
        tried = len(one.asked)
        assert not two.asked, "it lives"
        routers.documents.gone = {"one"}
        routers.now_s += 6
        await two.until(6)
        routers.documents.gone = set()  # it only stood still, and goes on
        one.outcomes[:] = [Delivered()]
        routers.now_s += 3600
        routers.boxes["one"].note(msgspec.structs.replace(EVENT, subject="new"))
        await one.until(tried + 1)
        await asyncio.sleep(0.05)
        new = msgspec.structs.replace(EVENT, subject="new").name
        assert [event for _, event in one.asked[tried:]] == [new], "the others are not its own any more"
        assert sorted(event for _, event in two.asked) == sorted(event.name for event in events)
        assert routers.boxes["one"].waiting == {"a.example": 0}

    routers.live(use)


@pytest.mark.usefixtures("soon")
def test_who_stood_still_while_it_sent_does_not_send_again() -> None:
    routers = Routers()

    async def use() -> None:
        one, two, answered = routers.senders["one"], routers.senders["two"], asyncio.Event()
        send = one.send

        async def slowly(receiver: Receiver, event: str, body: str) -> Outcome:
            outcome = await send(receiver, event, body)
            await answered.wait()
            return outcome

        one.send = slowly  # type: ignore[method-assign]
        await _noted(routers.boxes["one"], EVENT)
        routers.documents.gone = {"one"}
        await two.until(1)
        routers.documents.gone = set()
        answered.set()
        await asyncio.sleep(0.05)
        assert routers.boxes["one"].waiting == {"a.example": 0}
        states = [doc.tags["state"] for kept in routers.documents.kept.values() for doc in kept.values() if doc.tags]
        assert states == ["taken"]

    routers.live(use)


@pytest.mark.usefixtures("soon")
def test_who_cannot_ask_whose_an_event_is_sends_it_later() -> None:
    routers = Routers()

    async def use() -> None:
        one = routers.senders["one"]
        await _noted(routers.boxes["one"], EVENT)
        assert len(one.asked) == 1
        routers.documents.lost = "away"
        routers.now_s += 6
        routers.boxes["one"].note(msgspec.structs.replace(EVENT, subject="new"))  # wakes it, and nobody else has it
        await one.until(2)
        await asyncio.sleep(0.05)
        assert [event for _, event in one.asked].count(EVENT.name) == 1
        routers.documents.lost, one.outcomes[:] = None, [Delivered()]
        for _ in range(20):
            routers.now_s += 10
            routers.boxes["one"].note(EVENT)
            await asyncio.sleep(0.01)
        assert [event for _, event in one.asked].count(EVENT.name) == 2

    routers.live(use)


@pytest.mark.usefixtures("soon")
def test_what_a_router_told_that_is_gone_is_not_told_again_of_the_batches_that_it_left() -> None:
    routers = Routers()
    routers.senders["one"].outcomes[:] = [Delivered()]

    async def use() -> None:
        await _noted(routers.boxes["one"], EVENT)
        routers.documents.gone = {"one"}
        routers.boxes["two"].note(EVENT)
        await asyncio.sleep(0.1)
        assert not routers.senders["two"].asked

    routers.live(use)


@pytest.mark.usefixtures("soon")
def test_who_begins_anew_does_not_tell_again_what_another_took_over_meanwhile() -> None:
    routers = Routers()
    routers.senders["one"].outcomes[:] = [Delivered()]

    async def use() -> None:
        await _noted(routers.boxes["one"], EVENT)
        routers.documents.gone = {"one"}
        await asyncio.sleep(0.1)
        routers.documents.gone = set()
        routers.boxes["one"].note(EVENT)  # of a batch that it finds ended
        await asyncio.sleep(0.1)
        assert len(routers.senders["one"].asked) == 1
        assert not routers.senders["two"].asked

    routers.live(use)
