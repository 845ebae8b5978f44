"""The rows in a database."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

from sqlalchemy import text
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection

from records import statements as sql
from records.base import Batch, Claim, Holder, TraceName, TraceRow
from records.database import engine_of, make_file, migrate
from records.translate import escaped, plain, translated

TRACES_AT_ONCE = 40
"""Read, or looked at, by one statement."""
READ_ROWS = 200
CLOSE_S = 2.0
"""A server that is frozen takes no leave."""


class SqlRecords:
    """Implements :class:`records.base.Records`. Nothing is opened before it is needed.

    Args:
        url: the database's: see :func:`records.database.database_url`.
        scope: whose rows: a cluster's, or a router's whose file it is.
        router: who writes.
        life: which life of it: told from all others.
        address: ``host:port`` of its control plane.
        timeout_s: what a write, or a part of what is read, may take.
    """

    def __init__(self, url: URL, scope: str, router: str, life: str, address: str, timeout_s: float) -> None:
        self._url = url
        self._scope = scope
        self._timeout_s = timeout_s
        self._engine = engine_of(url, timeout_s)
        self._sqlite = url.get_backend_name() == "sqlite"
        self._migrated = False
        self._me = {"b_scope": scope, "b_router": router, "b_life": life}
        self._address = address

    async def write(self, batch: Batch) -> frozenset[TraceName]:
        with translated():
            async with asyncio.timeout(self._timeout_s):
                await self._ready()
                async with self._engine.begin() as connection:
                    lost = await self._write(connection, batch)
                if batch.erased and self._sqlite:
                    await self._checkpoint()
        return lost

    async def adopt(self, *, others: bool, all_mine: bool) -> list[Claim]:
        with translated():
            async with asyncio.timeout(self._timeout_s):
                await self._ready()
                async with self._engine.begin() as connection:
                    now_s = (await connection.execute(sql.now(sqlite=self._sqlite))).scalar_one()
                    found = list((await connection.execute(sql.ADOPT_MINE, self._me)).all())
                    if others:
                        found += (await connection.execute(sql.ADOPT_OTHERS, {**self._me, "b_now_s": now_s})).all()
                    if all_mine:
                        found = list((await connection.execute(sql.MINE, self._me)).all())
        return [Claim(plain(tenant), plain(trace), fence) for tenant, trace, fence in found]

    async def claim(self, name: TraceName) -> Claim | None:
        with translated():
            async with asyncio.timeout(self._timeout_s):
                await self._ready()
                async with self._engine.begin() as connection:
                    found = (await connection.execute(sql.CLAIM, {**self._me, **_named(name)})).all()
        return Claim(*name, found[0][0]) if found else None

    async def holder(self, tenant: str, name: str, tips: Sequence[bytes] = (), answer: str = "") -> Holder | None:
        where = {"b_scope": self._scope, "b_tenant": escaped(tenant)}
        with translated():
            async with asyncio.timeout(self._timeout_s):
                await self._ready()
                async with self._engine.connect() as connection:
                    found = (await connection.execute(sql.BY_NAME, {**where, "b_trace": escaped(name)})).all()
                    if not found and tips:
                        found = (await connection.execute(sql.BY_TIP, {**where, "b_tips": list(tips)})).all()
                        found = sorted(found, key=lambda row: tips.index(row.tip))
                    if not found and answer:
                        found = (await connection.execute(sql.BY_ANSWER, {**where, "b_answer": answer})).all()
                    if not found:
                        return None
                    row, now_s = found[-1], (await connection.execute(sql.now(sqlite=self._sqlite))).scalar_one()
        lives = row.until_s is not None and row.until_s > now_s
        return Holder(tenant, plain(row.trace), row.router, row.address or "", lives)

    async def live(self, for_s: float) -> Mapping[str, str]:
        with translated():
            async with asyncio.timeout(self._timeout_s):
                await self._ready()
                async with self._engine.begin() as connection:
                    now_s = (await connection.execute(sql.now(sqlite=self._sqlite))).scalar_one()
                    row = {**self._me, "b_address": self._address, "b_until_s": now_s + for_s if for_s else 0.0}
                    await connection.execute(sql.LIVE, row)
                    found = (await connection.execute(sql.OTHERS, {**self._me, "b_now_s": now_s})).all()
        return {row.router: row.address or "" for row in found}

    async def rows(self, names: Sequence[TraceName]) -> AsyncIterator[Sequence[TraceRow]]:
        for asked in _asked(names):
            async for rows in self._rows(asked):
                yield rows

    async def erase(self, tenant: str) -> int:
        where = {"b_scope": self._scope, "b_tenant": escaped(tenant)}
        with translated():
            async with asyncio.timeout(self._timeout_s):
                await self._ready()
                async with self._engine.begin() as connection:
                    gone = (await connection.execute(sql.ERASE_HEADS, where)).rowcount
                    await connection.execute(sql.ERASE_ROWS, where)
                if self._sqlite:
                    await self._checkpoint()
        return gone

    async def close(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._engine.dispose()
        except TimeoutError:
            pass

    async def _ready(self) -> None:
        if not self._migrated:
            if self._sqlite:
                make_file(self._url)
            await migrate(self._engine)
            self._migrated = True

    async def _rows(self, some: Mapping[str, object]) -> AsyncIterator[Sequence[TraceRow]]:
        asked: dict[str, object] = {"b_scope": self._scope, "b_limit": READ_ROWS, **some}
        query = sql.rows(sqlite=self._sqlite, after=False)
        while True:
            with translated():
                async with asyncio.timeout(self._timeout_s):
                    await self._ready()
                    async with self._engine.connect() as connection:
                        found = (await connection.execute(query, asked)).all()
            if found:
                yield [TraceRow(plain(row[0]), plain(row[1]), *row[2:]) for row in found]
            if len(found) < READ_ROWS:
                return
            # Rows that go meanwhile, as a trace is written whole, move none of those that follow.
            query = sql.rows(sqlite=self._sqlite, after=True)
            asked |= dict(zip(("b_trace", "b_number"), found[-1][1:3], strict=True))

    async def _write(self, connection: AsyncConnection, batch: Batch) -> frozenset[TraceName]:
        scope = {"b_scope": self._scope}
        claims = {_name(claim): (max(1, claim.fence), marks) for claim, marks in batch.claims}
        fences = {name: fence for name, (fence, _) in claims.items()}
        fences |= {_name(claim): claim.fence for claim in batch.erased}
        if new := [_name(claim) for claim, _ in batch.claims if claim.fence == 0]:
            await connection.execute(sql.NEW, [{**self._me, **_named(name)} for name in new])
        held = await self._held(connection, list(fences))
        lost = frozenset(name for name, fence in fences.items() if held.get(name) != fence)
        if gone := [{**scope, **_named(_name(claim))} for claim in batch.erased if _name(claim) not in lost]:
            await connection.execute(sql.ERASE, gone)
            await connection.execute(sql.ERASE_HEAD, gone)
        rows = [row for row in batch.rows if TraceName(row.tenant, row.trace) not in lost]
        if rows:
            named = [{**row._asdict(), "tenant": escaped(row.tenant), "trace": escaped(row.trace)} for row in rows]
            await connection.execute(sql.INSERT, [{"scope": self._scope, **row} for row in named])
        if marks := [
            {**scope, **_named(name), "b_tip": found.tip, "b_answer": found.answers[0], "b_heard": found.answers[1]}
            for name, (_, found) in claims.items()
            if name not in lost
        ]:
            await connection.execute(sql.MARK, marks)
        if old := [
            {**scope, **_named(name), "b_number": number} for name, number in batch.superseded if name not in lost
        ]:
            await connection.execute(sql.SUPERSEDE, old)
        return lost

    async def _held(self, connection: AsyncConnection, names: Sequence[TraceName]) -> dict[TraceName, int]:
        """Those that this life has, with their fences; nobody takes them before the transaction has ended."""
        held: dict[TraceName, int] = {}
        query = sql.held(sqlite=self._sqlite)
        for some in _asked(names):
            found = (await connection.execute(query, {**self._me, **some})).all()
            held |= {TraceName(plain(tenant), plain(trace)): fence for tenant, trace, fence in found}
        return held

    async def _checkpoint(self) -> None:
        """What was erased is in the log no more, either."""
        async with self._engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))


def _name(claim: Claim) -> TraceName:
    return TraceName(claim.tenant, claim.trace)


def _named(name: TraceName) -> dict[str, object]:
    return {"b_tenant": escaped(name.tenant), "b_trace": escaped(name.trace)}


def _asked(names: Sequence[TraceName]) -> Iterator[dict[str, object]]:
    """The parameters of statements about those: of one tenant each, so that any planner finds them by the index."""
    traces: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        traces.setdefault(escaped(name.tenant), []).append(escaped(name.trace))
    for tenant, all_of in traces.items():
        for at in range(0, len(all_of), TRACES_AT_ONCE):
            yield {"b_tenant": tenant, "b_traces": all_of[at : at + TRACES_AT_ONCE]}
