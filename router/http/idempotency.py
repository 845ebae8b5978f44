"""Answers that may be asked for again by an ``Idempotency-Key``: what was told of each, and how long it is kept. Pure.

An answer is its bytes as they were told, whole events of a stream, or a body. Each event of a stream has an id: how
many events of each choice were told with it, joined by dots. A client that tells the last one it has is told the rest.
"""

import re
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from blake3 import blake3

from router.calls.errors import CallFailed, invalid

KEY_CHARACTERS_MAX = 255
"""As Stripe has it."""
SEGMENT_BYTES = 64 * 2**10
"""Of what was told, packed by so much: events repeat themselves, twenty to one."""
ENTRY_BYTES = 2048
"""Memory of an answer without what was told."""
_KEY = re.compile(rf"[!-~]{{1,{KEY_CHARACTERS_MAX}}}", re.ASCII)
_EVENT_ID = re.compile(r"\d{1,9}(\.\d{1,9})*", re.ASCII)
_ID, _END = b"id: ", b"\n\n"

Name = tuple[str, str, str]
"""A tenant, a path, a key."""


def key_of(sent: str | None) -> str | None:
    """What a client names its call; None: nothing.

    Raises:
        CallFailed: it is no name.
    """
    if sent is None:
        return None
    if not _KEY.fullmatch(sent):
        message = f"Idempotency-Key must be 1 to {KEY_CHARACTERS_MAX} visible ASCII characters"
        raise invalid(message, "Idempotency-Key", "invalid_idempotency_key")
    return sent


def fingerprint(tenant: str, path: str, key: str, body: bytes) -> str:
    """Names a call: the same for the same, and told from all others. 32 hexadecimal digits."""
    hashed = blake3("\0".join((tenant, path, key)).encode())
    return hashed.update(b"\0").update(body).hexdigest(16)


# --- events of a stream -----------------------------------------------------------------------------------------


class Numbers:
    """Numbers the events of a stream of so many choices."""

    def __init__(self, choices: int) -> None:
        self._counts = [0] * choices

    def numbered(self, choice: int, data: bytes) -> bytes:
        """Events of a choice, each with its id."""
        told: list[bytes] = []
        for event in data.split(_END)[:-1]:
            self._counts[choice] += 1
            told.append(b"%b%b\n%b%b" % (_ID, _joined(self._counts), event, _END))
        return b"".join(told)


def last_event(sent: str | None) -> list[int] | None:
    """What a client has of a stream: events of each choice; None: it does not say.

    Raises:
        CallFailed: it is no id of an event.
    """
    if sent is None:
        return None
    if not _EVENT_ID.fullmatch(sent):
        raise unknown_event()
    return [int(count) for count in sent.split(".")]


class Rest:
    """What of a stream, read from its beginning, follows what a client has. An event counts one more of its own choice
    than the one before it. The stream may be told in another order than the client was: only each choice's is the same.
    """

    def __init__(self, has: Sequence[int]) -> None:
        self._has = list(has)
        self._counts = [0] * len(has)

    def of(self, data: bytes) -> bytes:
        """The same without what it has, with ids that count that.

        Raises:
            CallFailed: this stream has no such ids.
        """
        return b"".join(rest for event in data.split(_END)[:-1] if (rest := self._new(event)))

    def over(self) -> None:
        """The stream has ended.

        Raises:
            CallFailed: the client names an event that it did not have.
        """
        if any(count < had for count, had in zip(self._counts, self._has, strict=True)):
            raise unknown_event()

    def _new(self, event: bytes) -> bytes:
        head, _, rest = event.partition(b"\n")
        if not head.startswith(_ID):
            return event + _END
        counts = [int(count) for count in head[len(_ID) :].split(b".")]
        if len(counts) != len(self._has):
            raise unknown_event()
        (choice,) = [at for at, count in enumerate(counts) if count != self._counts[at]]
        self._counts = counts
        if counts[choice] <= self._has[choice]:
            return b""
        return b"%b%b\n%b%b" % (_ID, _joined(map(max, counts, self._has)), rest, _END)


class Since:
    """What of a stream, read from its beginning, follows so many events. ``param``: says how many."""

    def __init__(self, count: int, param: str) -> None:
        self._left = count
        self._param = param

    def of(self, data: bytes) -> bytes:
        """The same without those."""
        if not self._left:
            return data
        events = data.split(_END)[:-1]
        skipped = min(self._left, len(events))
        self._left -= skipped
        return b"".join(event + _END for event in events[skipped:])

    def over(self) -> None:
        """The stream has ended.

        Raises:
            CallFailed: it did not have so many.
        """
        if self._left:
            raise invalid(f"the stream has no such event: {self._left} less than {self._param} says", self._param)


def unknown_event() -> CallFailed:
    """A client names an event that its stream does not have."""
    return invalid("Last-Event-ID is no id of an event of this stream", "Last-Event-ID", "invalid_event_id")


def _joined(counts: Iterable[int]) -> bytes:
    return ".".join(map(str, counts)).encode()


class Told:
    """What was told so far, in pieces of whole events; most of it packed."""

    def __init__(self) -> None:
        self.size = 0
        self._segments: list[tuple[int, int, bytes]] = []
        """Where each begins and ends, and what is in it, packed."""
        self._tail: list[bytes] = []
        self._tail_begins = 0

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.size - self._tail_begins + sum(len(packed) for _, _, packed in self._segments)

    def append(self, data: bytes) -> None:
        """A piece more."""
        self._tail.append(data)
        self.size += len(data)
        if self.size - self._tail_begins >= SEGMENT_BYTES:
            self.pack()

    def pack(self) -> None:
        """Pack all of it."""
        if self._tail:
            packed = zlib.compress(b"".join(self._tail), 1)
            self._segments.append((self._tail_begins, self.size, packed))
            self._tail, self._tail_begins = [], self.size

    def read(self, at: int) -> bytes:
        """What follows there, where a piece ended; some of it, or nothing yet."""
        if at >= self._tail_begins:
            return b"".join(self._tail)[at - self._tail_begins :]
        begin, packed = next((begin, packed) for begin, end, packed in reversed(self._segments) if begin <= at < end)
        return zlib.decompress(packed)[at - begin :]


# --- answers that are kept --------------------------------------------------------------------------------------


class Answer(Protocol):
    """What is kept of an answer."""

    @property
    def told(self) -> Told:
        """Its bytes."""
        ...


A = TypeVar("A", bound=Answer)


class Entry(Generic[A]):
    """One answer."""

    def __init__(self, name: Name, call: str, answer: A, now_s: float) -> None:
        self.name = name
        self.call = call
        """See :func:`fingerprint`."""
        self.answer = answer
        self.readers = 0
        self.left_s: float | None = now_s
        """Since when nobody reads it; None: somebody does."""
        self.began_s = now_s
        self.ended = False
        self.trace: tuple[str, str] | None = None
        """In which it was given; None: not known yet."""


class Ledger(Generic[A]):
    """The answers.

    Args:
        bytes_max: memory for those that have ended; of more, the oldest go.
        age_s: older ones go, too.
        grace_s: one that runs goes on for so long when its last reader has left.
    """

    def __init__(self, bytes_max: int, age_s: float, grace_s: float) -> None:
        self._bytes_max = bytes_max
        self._age_s = age_s
        self._grace_s = grace_s
        self._entries: OrderedDict[Name, Entry[A]] = OrderedDict()
        self._nbytes: dict[Name, int] = {}
        """Of those that have ended."""
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def asked(self, name: Name, call: str, now_s: float) -> Entry[A] | None:
        """What is known of an answer that is asked for; None: nothing.

        Raises:
            CallFailed: another was asked for by this name.
        """
        self._expire(now_s)
        entry = self._entries.get(name)
        if entry is not None and entry.call != call:
            message = (
                "this Idempotency-Key was used for another request: a key names one request, with the same body each "
                "time. Send a new key with a new request"
            )
            raise CallFailed("mismatched", message, param="Idempotency-Key", code="idempotency_key_reused")
        return entry

    def begin(self, name: Name, call: str, answer: A, now_s: float) -> Entry[A]:
        """One that nobody asked for before begins."""
        assert name not in self._entries
        entry = self._entries[name] = Entry(name, call, answer, now_s)
        return entry

    def read(self, entry: Entry[A]) -> None:
        """Somebody reads it; :meth:`left` follows."""
        entry.readers += 1
        entry.left_s = None

    def left(self, entry: Entry[A], now_s: float) -> float | None:
        """Who read it does not any more. Returns when to look whether it is abandoned; None: it is not."""
        entry.readers -= 1
        if entry.readers or entry.ended:
            return None
        entry.left_s = now_s
        return now_s + self._grace_s

    def abandoned(self, entry: Entry[A], now_s: float) -> bool:
        """Nobody has come back to one that runs."""
        return not entry.ended and entry.left_s is not None and now_s >= entry.left_s + self._grace_s

    def end(self, entry: Entry[A]) -> None:
        """It has ended well: it is kept."""
        entry.answer.told.pack()
        entry.ended = True
        self._nbytes[entry.name] = nbytes = ENTRY_BYTES + entry.answer.told.nbytes
        self.nbytes += nbytes
        self._shrink()

    def drop(self, entry: Entry[A]) -> None:
        """Forget it: it failed, and may be tried again, or is too old."""
        if self._entries.get(entry.name) is entry:
            del self._entries[entry.name]
            self.nbytes -= self._nbytes.pop(entry.name, 0)

    def forget(self, trace: tuple[str, str]) -> None:
        """All that was answered in a trace."""
        for entry in [entry for entry in self._entries.values() if entry.trace == trace]:
            self.drop(entry)

    def check(self) -> None:
        """Assert that the books agree."""
        ended = {name for name, entry in self._entries.items() if entry.ended}
        assert ended == self._nbytes.keys()
        assert self.nbytes == sum(self._nbytes.values())
        assert self.nbytes <= self._bytes_max

    def _expire(self, now_s: float) -> None:
        for entry in list(self._old(now_s)):
            self.drop(entry)

    def _old(self, now_s: float) -> Iterator[Entry[A]]:
        for entry in self._entries.values():
            if now_s - entry.began_s < self._age_s:
                return
            if entry.ended:
                yield entry

    def _shrink(self) -> None:
        while self.nbytes > self._bytes_max:
            self.drop(self._entries[next(iter(self._nbytes))])
