"""Responses that are kept, each tenant's for itself, in bounded memory. Pure."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import inf
from typing import Protocol

import msgspec

from router.dialects.responses.answers import Response
from router.dialects.responses.requests import Item, Part

ENTRY_BYTES, ITEM_BYTES = 1024, 256
"""About what an entry, and an item, take beside their contents."""
_encode = msgspec.json.Encoder().encode
_items = msgspec.json.Decoder(list[Item])

Key = tuple[str, str]
"""A tenant and the name of a response."""


class _Created(msgspec.Struct):
    created_at: int


class Limits(msgspec.Struct, frozen=True):
    """Of all that is kept."""

    count: int
    nbytes: int
    age_s: float


Named = tuple[str, msgspec.Raw]
"""An item, as it is told, with its id."""


class Turn:
    """What one response added to a conversation; shared by all that follow it."""

    __slots__ = ("before", "holders", "items", "names", "nbytes")

    def __init__(self, before: "Turn | None", named: Sequence[Named]) -> None:
        """``named``: its items with their ids, as they are told."""
        self.before = before
        self.names = [name for name, _ in named]
        self.items = [item for _, item in named]
        items = self.items
        self.nbytes = sum(len(item) + ITEM_BYTES for item in items) + ENTRY_BYTES
        self.holders = 0
        """Responses and turns that lead here."""


class Entry:
    """One response that is kept."""

    __slots__ = ("asked", "background", "body", "created_s", "ended", "key", "output", "stream")

    def __init__(self, key: Key, body: bytes, asked: Turn, created_s: float, *, background: bool) -> None:
        self.key = key
        self.body = body
        """As it is told."""
        self.background = background
        self.asked = asked
        """What it answers."""
        self.output: Turn | None = None
        """What it leads to, once it has ended."""
        self.created_s = created_s
        self.stream: Stream | None = None
        """As it was streamed, where it ran in the background and has ended."""


class Stream(Protocol):
    """The events of a response, all of them."""

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        ...


class Kept:
    """The responses. Beyond a limit the oldest of the tenant that has most of them goes."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        """The oldest first, as each tenant's."""
        self._of: dict[str, OrderedDict[Key, None]] = {}
        self._bytes_of: dict[str, int] = {}
        """Each tenant's, what they share counted once."""
        self._items: dict[Key, msgspec.Raw] = {}
        """By tenant and id."""
        self.nbytes = 0
        """Of all tenants'."""
        self.ended: Callable[[Key, Response], None] = lambda key, response: None
        """Hears of each that has ended."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key, now_s: float) -> Entry | None:
        """None: it is unknown, forgotten, or somebody else's."""
        self._expire(now_s)
        return self._entries.get(key)

    def of(self, tenant: str, until_s: float = inf) -> list[Key]:
        """All of theirs that were made until then, in Unix seconds."""
        theirs = list(self._of.get(tenant, ()))
        return theirs if until_s == inf else [key for key in theirs if _created(self._entries[key].body) <= until_s]

    def item(self, tenant: str, name: str) -> Item | None:
        """One item of what is kept; None: there is none of that name, or it is somebody else's."""
        found = self._items.get((tenant, name))
        return None if found is None else msgspec.json.decode(found, type=Item)

    def begin(self, key: Key, response: Response, asked: Sequence[Item], before: Turn | None, now_s: float) -> None:
        """Keep a response that has not ended. ``before``: what its request goes on from."""
        self._expire(now_s)
        name = response.id.removeprefix("resp_")
        named = [_named(item, f"{name}i{at:03d}") for at, item in enumerate(asked)]
        turn = Turn(before, [(item.id or "", msgspec.Raw(_encode(item))) for item in named])
        held = self._held(key[0], turn)
        self.drop(key)  # it is begun anew
        entry = Entry(key, _encode(response), held, now_s, background=response.background)
        self._entries[key] = entry
        self._of.setdefault(key[0], OrderedDict())[key] = None
        self._add(key[0], len(entry.body))
        self._shrink()

    def restore(self, key: Key, body: bytes, asked: Turn, output: Sequence[Named], now_s: float) -> None:
        """Keep a response that has ended in an earlier life, in the background."""
        entry = Entry(key, body, self._held(key[0], asked), now_s, background=True)
        self._entries[key] = entry
        self._of.setdefault(key[0], OrderedDict())[key] = None
        entry.output = self._held(key[0], Turn(entry.asked, output))
        self._add(key[0], len(body))
        self._shrink()

    def change(self, key: Key, response: Response, *, ended: bool) -> None:
        """A response has gone on or come to its end, unless it was forgotten or has ended before."""
        entry = self._entries.get(key)
        if entry is None or entry.output is not None:
            return
        before, entry.body = len(entry.body), _encode(response)
        self._add(key[0], len(entry.body) - before)
        if ended:
            output = [(item.id, msgspec.Raw(_encode(item))) for item in response.output]
            entry.output = self._held(key[0], Turn(entry.asked, output))
            self.ended(key, response)
        self._shrink()

    def streamed(self, key: Key, stream: Stream) -> None:
        """A response that has ended was streamed so, unless it was forgotten."""
        entry = self._entries.get(key)
        if entry is not None and entry.stream is None:
            entry.stream = stream
            self._add(key[0], stream.nbytes)
            self._shrink()

    def drop(self, key: Key) -> bool:
        """Forget it. False: there is none."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        tenant = key[0]
        self._add(tenant, -len(entry.body) - (0 if entry.stream is None else entry.stream.nbytes))
        for turn in (entry.output, entry.asked):
            self._let_go(tenant, turn)
        del self._of[tenant][key]
        if not self._of[tenant]:
            del self._of[tenant], self._bytes_of[tenant]
        return True

    def _add(self, tenant: str, nbytes: int) -> None:
        self._bytes_of[tenant] = self._bytes_of.get(tenant, 0) + nbytes
        self.nbytes += nbytes

    def _held(self, tenant: str, turn: Turn) -> Turn:
        turn.holders += 1
        if turn.before is not None:
            turn.before.holders += 1
        self._add(tenant, turn.nbytes)
        for name, item in zip(turn.names, turn.items, strict=True):
            self._items[tenant, name] = item
        return turn

    def _let_go(self, tenant: str, turn: Turn | None) -> None:
        while turn is not None:
            turn.holders -= 1
            if turn.holders:
                return
            self._add(tenant, -turn.nbytes)
            for name, item in zip(turn.names, turn.items, strict=True):
                if self._items.get((tenant, name)) is item:  # a client may use one id for several
                    del self._items[tenant, name]
            turn = turn.before

    def _expire(self, now_s: float) -> None:
        while self._entries:
            oldest = next(iter(self._entries.values()))
            if now_s - oldest.created_s < self._limits.age_s:
                return
            self.drop(oldest.key)

    def _shrink(self) -> None:
        while len(self._entries) > self._limits.count or (self._entries and self.nbytes > self._limits.nbytes):
            tenant = max(self._bytes_of, key=self._bytes_of.__getitem__)
            self.drop(next(iter(self._of[tenant])))


def chain(turn: Turn | None) -> list[msgspec.Raw]:
    """The items of a conversation up to there, the first said first."""
    turns: list[Turn] = []
    while turn is not None:
        turns.append(turn)
        turn = turn.before
    return [item for turn in reversed(turns) for item in turn.items]


def items_of(raw: Sequence[msgspec.Raw]) -> list[Item]:
    """The same, to be read."""
    return _items.decode(b"[" + b",".join(map(bytes, raw)) + b"]")


def _created(body: bytes) -> int:
    return msgspec.json.decode(body, type=_Created).created_at


def _named(item: Item, fresh: str) -> Item:
    """As it is told again: with an id, its content in parts."""
    kind = item.type or "message"
    content = item.content
    if isinstance(content, str):
        content = [Part("output_text" if item.role == "assistant" else "input_text", content)]
    prefix = {"message": "msg", "reasoning": "rs"}.get(kind, "item")
    return msgspec.structs.replace(
        item, type=kind, id=item.id or f"{prefix}_{fresh}", content=content, status=item.status or "completed"
    )
