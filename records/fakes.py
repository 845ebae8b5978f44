"""Rows in memory that outlive whoever writes them: for tests, and for a simulated cluster."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from records.base import Batch, Claim, Holder, Marks, RecordsLost, TraceName, TraceRow
from records.documents import Document, Mark, Shelf, cut, fitting, in_excess
from tracehaul.runtime import clock

ROWS_AT_ONCE = 50


@dataclass
class _Head:
    router: str
    life: str
    fence: int
    marks: Marks


@dataclass
class MemoryTables:
    """What routers share."""

    kept: dict[tuple[TraceName, int], TraceRow] = field(default_factory=dict[tuple[TraceName, int], TraceRow])
    heads: dict[TraceName, _Head] = field(default_factory=dict[TraceName, _Head])
    lives: dict[str, tuple[str, str, float]] = field(default_factory=dict[str, tuple[str, str, float]])
    """Of routers: life, address, and until when others believe in it."""
    now_s: Callable[[], float] = clock.now_s


class MemoryRecords:
    """Implements :class:`records.base.Records`: one life of one router."""

    def __init__(
        self, tables: MemoryTables | None = None, router: str = "r", life: str = "1", address: str = ""
    ) -> None:
        self.tables = tables or MemoryTables()
        self.lost: str | None = None
        """Why nothing can be asked of it; None: it can."""
        self._router = router
        self._life = life
        self._address = address

    @property
    def kept(self) -> list[TraceRow]:
        """All rows."""
        return [self.tables.kept[place] for place in sorted(self.tables.kept)]

    async def write(self, batch: Batch) -> frozenset[TraceName]:
        self._check()
        claims = {TraceName(claim.tenant, claim.trace): (claim.fence, marks) for claim, marks in batch.claims}
        erased = {TraceName(claim.tenant, claim.trace): claim.fence for claim in batch.erased}
        heads, kept = dict(self.tables.heads), dict(self.tables.kept)
        for name, (fence, marks) in claims.items():
            if fence == 0:
                heads.setdefault(name, _Head(self._router, self._life, 1, marks))
        fences = {**{name: max(1, fence) for name, (fence, _) in claims.items()}, **erased}
        lost = frozenset(name for name, fence in fences.items() if not self._has(heads.get(name), fence))
        for name in erased.keys() - lost:
            del heads[name]
            kept = {place: row for place, row in kept.items() if place[0] != name}
        for row in batch.rows:
            name = TraceName(row.tenant, row.trace)
            assert name in claims, f"nobody has {name}"
            if name not in lost:
                assert (name, row.number) not in kept, f"a number is written twice: {name} {row.number}"
                kept[name, row.number] = row
        for name, number in batch.superseded:
            if name not in lost:
                kept = {place: row for place, row in kept.items() if place[0] != name or place[1] >= number}
        for name in claims.keys() - lost:
            heads[name].marks = claims[name][1]
        self.tables.heads, self.tables.kept = heads, kept
        return lost

    async def adopt(self, *, others: bool, all_mine: bool) -> list[Claim]:
        self._check()
        now_s, found = self.tables.now_s(), list[Claim]()
        for name, head in sorted(self.tables.heads.items()):
            mine = head.router == self._router
            lives = self.tables.lives.get(head.router, ("", "", 0.0))[2] > now_s
            taken = head.life != self._life if mine else others and not lives
            if taken:
                head.router, head.life, head.fence = self._router, self._life, head.fence + 1
            if taken or (all_mine and mine):
                found.append(Claim(*name, head.fence))
        return found

    async def claim(self, name: TraceName) -> Claim | None:
        self._check()
        head = self.tables.heads.get(name)
        if head is None:
            return None
        head.router, head.life, head.fence = self._router, self._life, head.fence + 1
        return Claim(*name, head.fence)

    async def holder(self, tenant: str, name: str, tips: Sequence[bytes] = (), answer: str = "") -> Holder | None:
        self._check()
        heads = {name: head for name, head in self.tables.heads.items() if name.tenant == tenant}
        found = TraceName(tenant, name) if TraceName(tenant, name) in heads else None
        if found is None:
            by_tip = {head.marks.tip: name for name, head in heads.items() if head.marks.tip}
            found = next((by_tip[tip] for tip in reversed(tips) if tip in by_tip), None)
        if found is None and answer:
            found = next((name for name, head in heads.items() if answer in head.marks.answers), None)
        if found is None:
            return None
        router = heads[found].router
        _, address, until_s = self.tables.lives.get(router, ("", "", 0.0))
        return Holder(*found, router, address, until_s > self.tables.now_s())

    async def live(self, for_s: float) -> Mapping[str, str]:
        self._check()
        now_s, lives = self.tables.now_s(), self.tables.lives
        lives[self._router] = (self._life, self._address, now_s + for_s if for_s else 0.0)
        beside = ((name, *lives[name]) for name in lives if name != self._router)
        return {name: address for name, _, address, until_s in beside if until_s > now_s}

    async def rows(self, names: Sequence[TraceName]) -> AsyncIterator[Sequence[TraceRow]]:
        self._check()
        wanted = set(names)
        places = [place for place in sorted(self.tables.kept) if place[0] in wanted]
        for at in range(0, len(places), ROWS_AT_ONCE):
            self._check()
            yield [self.tables.kept[place] for place in places[at : at + ROWS_AT_ONCE] if place in self.tables.kept]

    async def erase(self, tenant: str) -> int:
        self._check()
        gone = [name for name in self.tables.heads if name.tenant == tenant]
        self.tables.heads = {name: head for name, head in self.tables.heads.items() if name.tenant != tenant}
        self.tables.kept = {place: row for place, row in self.tables.kept.items() if place[0].tenant != tenant}
        return len(gone)

    async def close(self) -> None:
        pass

    def _has(self, head: _Head | None, fence: int) -> bool:
        return head is not None and (head.router, head.life, head.fence) == (self._router, self._life, fence)

    def _check(self) -> None:
        if self.lost is not None:
            raise RecordsLost(self.lost)


class MemoryDocuments:
    """Implements :class:`records.documents.Documents`."""

    def __init__(self) -> None:
        self.gone: set[str] = set()
        """Routers that live no more."""
        self.kept: dict[Shelf, dict[str, Document]] = {}
        self.lost: str | None = None
        """As of :class:`MemoryRecords`."""

    async def put(self, shelf: Shelf, document: Document) -> None:
        self._on(shelf)[document.name] = document

    async def get(self, shelf: Shelf, name: str) -> Document | None:
        return self._on(shelf).get(name)

    async def list(
        self, shelf: Shelf, tags: Mapping[str, str], after: Mark | None, limit: int, *, newest_first: bool = False
    ) -> Sequence[Document]:
        found = sorted(self._on(shelf).values(), key=lambda each: each.mark, reverse=newest_first)
        if after is not None:
            found = [each for each in found if (each.mark < after if newest_first else each.mark > after)]
        found = [each for each in found if tags.items() <= each.tags.items()][:limit]
        return found[: fitting(len(each.body) for each in found)]

    async def tag(self, shelf: Shelf, name: str, tags: Mapping[str, str]) -> bool:
        known = self._on(shelf)
        if name not in known:
            return False
        known[name] = known[name]._replace(tags=tags)
        return True

    async def swap(self, shelf: Shelf, document: Document, before: Mapping[str, str] | None) -> bool:
        known = self._on(shelf)
        found = known.get(document.name)
        if (None if found is None else found.tags) != before:
            return False
        known[document.name] = document
        return True

    async def delete(self, shelf: Shelf, names: Sequence[str]) -> int:
        known = self._on(shelf)
        return sum(known.pop(name, None) is not None for name in set(names))

    async def adopt(self, shelf: Shelf) -> Sequence[str]:
        mine, found = self._on(shelf), list[str]()
        for other in [each for each in self.kept if each.kind == shelf.kind and each.tenant in self.gone]:
            fresh = [name for name in self.kept[other] if name not in mine]
            mine |= {name: self.kept[other].pop(name) for name in fresh}
            found += fresh
        return sorted(found)

    async def shelves(self, kind: str) -> Sequence[str]:
        return sorted(shelf.tenant for shelf in self.kept if shelf.kind == kind and self._on(shelf))

    async def trim(self, kind: str, before_us: int, count_max: int, bytes_max: int) -> int:
        gone = 0
        for shelf in [shelf for shelf in self.kept if shelf.kind == kind]:
            old = [each.name for each in self._on(shelf).values() if each.at_us < before_us]
            gone += await self.delete(shelf, old)
        while (excess := in_excess(self._sizes(kind), count_max, bytes_max)) is not None:
            shelf = Shelf(kind, excess[0])
            oldest = sorted(self._on(shelf).values(), key=lambda each: each.mark)[:1]
            names = cut([(each.name, len(each.body)) for each in oldest], *excess[1:])
            gone += await self.delete(shelf, names)
        return gone

    async def close(self) -> None:
        pass

    def _on(self, shelf: Shelf) -> dict[str, Document]:
        if self.lost is not None:
            raise RecordsLost(self.lost)
        return self.kept.setdefault(shelf, {})

    def _sizes(self, kind: str) -> dict[str, tuple[int, int]]:
        all_ = {shelf.tenant: list(kept.values()) for shelf, kept in self.kept.items() if shelf.kind == kind}
        return {tenant: (len(kept), sum(len(each.body) for each in kept)) for tenant, kept in all_.items()}
