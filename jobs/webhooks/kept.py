"""What is on its way to one receiver, as a database keeps it.

Several routers may keep theirs in one. What one leaves that lives no more is another's. It may only have stood still:
what it has it changes, and sends, only as long as that is there.
"""

from collections.abc import Mapping, Sequence

import msgspec

from jobs.webhooks.deliveries import Delivery
from records.documents import Document, Documents, Mark, Shelf

KIND, BEGUN = "webhook", "webhook-begun"
READ = 500
WAITS, TAKEN = {"state": "waits"}, {"state": "taken"}


class Kept:
    """One router's. Everything may raise RecordsLost.

    Args:
        documents: where it is kept.
        receiver: its name.
        router: whose it is.
        shared: other routers keep theirs beside it.
    """

    def __init__(self, documents: Documents, receiver: str, router: str, *, shared: bool) -> None:
        self._documents = documents
        self._receiver = receiver
        self._shelf = Shelf(f"{KIND}/{receiver}", router)
        self._shared = shared

    async def begun(self, made_at_us: int) -> int:
        """When the receiver was named first, in Unix microseconds; if nobody knows, then."""
        document = await self._documents.get(Shelf(BEGUN, ""), self._receiver)
        if document is None:
            document = Document(self._receiver, made_at_us, {}, b"")
            await self._documents.put(Shelf(BEGUN, ""), document)
        return document.at_us

    async def knows(self, event: str) -> bool:
        """It is on its way, or was taken; whoever has it."""
        if await self._documents.get(self._shelf, event) is not None:
            return True
        kind = self._shelf.kind
        others = (
            [each for each in await self._documents.shelves(kind) if each != self._shelf.tenant] if self._shared else []
        )
        for router in others:
            if await self._documents.get(Shelf(kind, router), event) is not None:
                return True
        return False

    async def has(self, event: str) -> bool:
        """It is on its way, and no other router has it by now."""
        if not self._shared:
            return True
        found = await self._documents.get(self._shelf, event)
        return found is not None and WAITS.items() <= found.tags.items()

    async def put(self, delivery: Delivery) -> None:
        """It is on its way."""
        await self._documents.put(self._shelf, _document(delivery, _tags(delivery)))

    async def later(self, delivery: Delivery) -> bool:
        """It was not taken. False: another router has it by now."""
        return await self._documents.tag(self._shelf, delivery.event, _tags(delivery))

    async def over(self, delivery: Delivery, *, new: bool) -> None:
        """It is on its way no more; ``new``: it was not kept. Of no effect where another router has it by now."""
        if new:
            await self._documents.put(self._shelf, _document(delivery, TAKEN))
        else:
            await self._documents.tag(self._shelf, delivery.event, TAKEN)

    async def page(self, after: Mark | None) -> tuple[list[Delivery], Mark | None]:
        """Some of what is on its way, and behind what the rest is; None: that is all."""
        found = await self._documents.list(self._shelf, WAITS, after, READ)
        return [_delivery(each) for each in found], found[-1].mark if found else None

    async def adopt(self) -> Sequence[str]:
        """What routers had that live no more is this one's from now on; which events these are."""
        return await self._documents.adopt(self._shelf) if self._shared else ()

    async def trim(self, before_us: int, count_max: int) -> None:
        """Forget what is older, and what is too much; of all routers'."""
        await self._documents.trim(self._shelf.kind, before_us, count_max, 2**40)


def _tags(delivery: Delivery) -> Mapping[str, str]:
    """What changes of it: tags can be given only to what is there."""
    return {**WAITS, "attempts": str(delivery.attempts), "due_s": str(delivery.due_s)}


def _document(delivery: Delivery, tags: Mapping[str, str]) -> Document:
    return Document(delivery.event, int(delivery.since_s * 1e6), tags, msgspec.json.encode(delivery))


def _delivery(document: Document) -> Delivery:
    told, tags = msgspec.json.decode(document.body, type=Delivery), document.tags
    return msgspec.structs.replace(told, attempts=int(tags["attempts"]), due_s=float(tags["due_s"]))
