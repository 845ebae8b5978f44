"""What connections hold at a store node: reservations and leases, by key, by holder and by time of expiry. Pure."""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import repeat
from typing import NamedTuple

import msgspec

from tracehaul.wire.ids import BlockHash, LeaseId


class Grant:
    """What one request of a writer reserved: of one owner, since one moment."""

    __slots__ = ("hashes", "open", "owner", "since_s")

    def __init__(self, owner: str, since_s: float) -> None:
        self.owner = owner
        self.since_s = since_s
        self.hashes: list[BlockHash] = []
        """Of all that it ever had."""
        self.open = 0
        """How many of these it still has."""


class Reservation(msgspec.Struct, frozen=True):
    """A slot that one writer may fill."""

    slot: int
    hash: BlockHash
    parent: BlockHash
    grant: Grant


class Reservations:
    """Open reservations. All live equally long, so the order of arrival is the order of expiry."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._by_hash: dict[BlockHash, Reservation] = {}
        self._grants: OrderedDict[Grant, None] = OrderedDict()  # cheap at its front, unlike dict
        self._by_owner: dict[str, dict[Grant, None]] = {}
        self._count: Counter[str] = Counter()
        self._renewed_s: dict[BlockHash, float] = {}

    def __len__(self) -> int:
        return len(self._by_hash)

    def set_ttl(self, ttl_s: float) -> None:
        """How long all live from now on, the open ones too: their order stays."""
        self._ttl_s = ttl_s

    def get(self, block_hash: BlockHash) -> Reservation | None:
        """The open reservation of a block."""
        return self._by_hash.get(block_hash)

    def find(self, hashes: Iterable[BlockHash]) -> list[Reservation | None]:
        """As :meth:`get` for each."""
        return list(map(self._by_hash.get, hashes))

    def has_none_of(self, hashes: Iterable[BlockHash]) -> bool:
        """Whether none of these is reserved."""
        return self._by_hash.keys().isdisjoint(hashes)

    def parent_of(self, block_hash: BlockHash) -> BlockHash | None:
        """What the reserved block is chained to."""
        reservation = self._by_hash.get(block_hash)
        return None if reservation is None else reservation.parent

    def of(self, owner: str) -> list[Reservation]:
        """All of one owner, oldest first."""
        return self._open_in(self._by_owner.get(owner, ()))

    def count(self, owner: str) -> int:
        """How many one owner has."""
        return self._count[owner]

    def add(
        self, grant: Grant, slots: Sequence[int], hashes: Sequence[BlockHash], parents: Sequence[BlockHash]
    ) -> None:
        """Open some in ``grant``; there must be none for these blocks. Grants begin in the order of their time."""
        assert self.has_none_of(hashes)
        self._by_hash.update(zip(hashes, map(Reservation, slots, hashes, parents, repeat(grant)), strict=True))
        grant.hashes += hashes
        grant.open += len(hashes)
        self._grants[grant] = None
        self._by_owner.setdefault(grant.owner, {})[grant] = None
        self._count[grant.owner] += len(hashes)

    def renew(self, reservation: Reservation, now_s: float) -> None:
        """The owner of an open one has said that it still writes it."""
        self._renewed_s[reservation.hash] = now_s

    def heard_s(self, reservation: Reservation) -> float:
        """When the owner of an open one last said anything of it."""
        return self._renewed_s.get(reservation.hash, reservation.grant.since_s)

    def end(self, grant: Grant, hashes: Sequence[BlockHash]) -> None:
        """Forget open ones of a grant."""
        for block_hash in hashes:
            del self._by_hash[block_hash]
        if self._renewed_s:
            for block_hash in hashes:
                self._renewed_s.pop(block_hash, None)
        self._count[grant.owner] -= len(hashes)
        grant.open -= len(hashes)
        if not grant.open:
            del self._grants[grant]
            own = self._by_owner[grant.owner]
            del own[grant]
            if not own:
                del self._by_owner[grant.owner], self._count[grant.owner]

    def deadline_s(self) -> float | None:
        """When the first of them expires."""
        first = next(iter(self._grants), None)
        return None if first is None else first.since_s + self._ttl_s

    def expired(self, now_s: float) -> list[Reservation]:
        """Those whose time has come, oldest first. They stay open until :meth:`end`."""
        over: list[Grant] = []
        for grant in self._grants:
            if grant.since_s + self._ttl_s > now_s:
                break
            over.append(grant)
        return self._open_in(over)

    def all(self) -> list[Reservation]:
        """Every open one, oldest first."""
        return self._open_in(self._grants)

    def _open_in(self, grants: Iterable[Grant]) -> list[Reservation]:
        found: list[Reservation] = []
        for grant in grants:
            own = (self._by_hash.get(block_hash) for block_hash in dict.fromkeys(grant.hashes))
            found += [reservation for reservation in own if reservation is not None and reservation.grant is grant]
        return found


class HeldLease(NamedTuple):
    """An open lease. A slot leased twice in one request counts twice."""

    holder: str
    expires_s: float
    slots: "array[int]"


class Leases:
    """Open leases."""

    def __init__(self) -> None:
        self._last = 0
        self._by_id: dict[LeaseId, HeldLease] = {}
        self._by_holder: dict[str, dict[LeaseId, None]] = {}
        self._heap: list[tuple[float, LeaseId]] = []  # may name leases that have ended

    def __len__(self) -> int:
        return len(self._by_id)

    def count(self, holder: str) -> int:
        """How many one holder has."""
        return len(self._by_holder.get(holder, ()))

    def of(self, holder: str) -> list[LeaseId]:
        """All of one holder, oldest first."""
        return list(self._by_holder.get(holder, ()))

    def is_held(self, lease: LeaseId, holder: str) -> bool:
        """Whether ``lease`` is open and ``holder``'s."""
        return lease in self._by_holder.get(holder, ())

    def next_id(self) -> LeaseId:
        """An id never used before."""
        self._last += 1
        return LeaseId(self._last)

    def add(self, lease: LeaseId, held: HeldLease) -> None:
        """Open one."""
        assert lease not in self._by_id
        self._by_id[lease] = held
        self._by_holder.setdefault(held.holder, {})[lease] = None
        heappush(self._heap, (held.expires_s, lease))
        if len(self._heap) > 2 * len(self._by_id) + 64:  # those that ended early pile up deep in the heap
            self._heap = [(held.expires_s, lease) for lease, held in self._by_id.items()]
            heapify(self._heap)

    def end(self, lease: LeaseId) -> "array[int]":
        """Forget an open one; returns the slots it protected."""
        held = self._by_id.pop(lease)
        own = self._by_holder[held.holder]
        del own[lease]
        if not own:
            del self._by_holder[held.holder]
        return held.slots

    def deadline_s(self) -> float | None:
        """When the first of them expires."""
        first = self._first()
        return None if first is None else self._by_id[first].expires_s

    def next_expired(self, now_s: float) -> LeaseId | None:
        """One whose time has come, if any. It stays open until :meth:`end`."""
        first = self._first()
        return first if first is not None and self._by_id[first].expires_s <= now_s else None

    def all(self) -> list[HeldLease]:
        """Every open one."""
        return list(self._by_id.values())

    def _first(self) -> LeaseId | None:
        while self._heap:
            lease = self._heap[0][1]
            if lease in self._by_id:
                return lease
            heappop(self._heap)
        return None
