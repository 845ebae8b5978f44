"""Documents in a database."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Executable, Row, and_, bindparam, delete, exists, func, insert, or_, select, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from records.base import RecordsLost
from records.database import engine_of, make_file, migrate
from records.documents import Document, Mark, Shelf, cut, fitting, in_excess
from records.schema import documents as table
from records.schema import router_lives as lives
from records.statements import now
from records.translate import escaped, plain, translated

LOOKED_AT = 500
"""Tags that are looked through at a time."""
WRITTEN_BYTES = 4 << 20
"""In one transaction, about."""
TRIMMED = 64
"""Of a tenant that has most, before it is asked again who that is."""
CLOSE_S = 2.0

_PLACE = ("scope", "kind", "tenant", "name")


def _put(new: postgresql.Insert | sqlite.Insert) -> Executable:
    """What is there of that name is as the new one, whoever puts it at once."""
    changed = {column.name: new.excluded[column.name] for column in table.columns if column.name not in _PLACE}
    return new.on_conflict_do_update(index_elements=_PLACE, set_=changed)


_INSERT = insert(table)
_PUT = {"postgresql": _put(postgresql.insert(table)), "sqlite": _put(sqlite.insert(table))}
_own = table.alias()
_GONE = select(lives.c.router).where(lives.c.scope == bindparam("b_scope"), lives.c.until_s <= bindparam("b_now_s"))
_ADOPT = (
    update(table)
    .where(
        table.c.scope == bindparam("b_scope"),
        table.c.kind == bindparam("b_kind"),
        table.c.tenant != bindparam("b_tenant"),
        table.c.tenant.in_(_GONE),
        ~exists().where(
            _own.c.scope == table.c.scope,
            _own.c.kind == table.c.kind,
            _own.c.tenant == bindparam("b_tenant"),
            _own.c.name == table.c.name,
        ),
    )
    .values(tenant=bindparam("b_tenant"))
    .returning(table.c.name)
)
_WHOLE = (table.c.name, table.c.at_us, table.c.tags, table.c.body)
_encode = msgspec.json.Encoder(order="sorted").encode
_tags = msgspec.json.Decoder(dict[str, str]).decode


class _Waiting(NamedTuple):
    """What is to be written."""

    shelf: Shelf
    document: Document
    written: asyncio.Future[None]


class SqlDocuments:
    """Implements :class:`records.documents.Documents`. Nothing is opened before it is needed.

    Args:
        url: the database's: see :func:`records.database.database_url`.
        scope: tells them from those of others there.
        timeout_s: what anything may take.
    """

    def __init__(self, url: URL, scope: str, timeout_s: float) -> None:
        self._url = url
        self._scope = scope
        self._timeout_s = timeout_s
        self._sqlite = url.get_backend_name() == "sqlite"
        self._engine = engine_of(url, timeout_s)
        self._migrating = asyncio.Lock()
        self._migrated = False
        self._waiting: list[_Waiting] = []
        self._writing: asyncio.Task[None] | None = None

    async def put(self, shelf: Shelf, document: Document) -> None:
        """What comes while something is written is written together."""
        waiting = _Waiting(shelf, document, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write(), name="documents")
        await waiting.written

    async def get(self, shelf: Shelf, name: str) -> Document | None:
        query = select(*_WHOLE).where(self._on(shelf), table.c.name == escaped(name))
        with translated():
            async with asyncio.timeout(self._timeout_s):
                await self._ready()
                async with self._engine.connect() as connection:
                    found = (await connection.execute(query)).first()
        return None if found is None else _document(found)

    async def list(
        self, shelf: Shelf, tags: Mapping[str, str], after: Mark | None, limit: int, *, newest_first: bool = False
    ) -> Sequence[Document]:
        with translated():
            async with asyncio.timeout(self._timeout_s):
                await self._ready()
                async with self._engine.connect() as connection:
                    names = await self._names(connection, shelf, tags, after, limit, newest_first=newest_first)
                    query = select(*_WHOLE).where(self._on(shelf), table.c.name.in_(names))
                    found = {row[0]: row for row in await connection.execute(query)} if names else {}
        return [_document(found[name]) for name in names if name in found]

    async def tag(self, shelf: Shelf, name: str, tags: Mapping[str, str]) -> bool:
        changed = update(table).where(self._on(shelf), table.c.name == escaped(name))
        with translated():
            async with asyncio.timeout(self._timeout_s):
                await self._ready()
                async with self._engine.begin() as connection:
                    result = await connection.execute(changed.values(tags=_encode(tags).decode()))
                    return result.rowcount > 0

    async def swap(self, shelf: Shelf, document: Document, before: Mapping[str, str] | None) -> bool:
        row = self._row(shelf, document)
        there = and_(self._on(shelf), table.c.name == row["name"])
        with translated():
            async with asyncio.timeout(self._timeout_s):
                await self._ready()
                try:
                    async with self._engine.begin() as connection:
                        if before is None:
                            await connection.execute(_INSERT, row)
                            return True
                        was = and_(there, table.c.tags == _encode(before).decode())
                        return (await connection.execute(update(table).where(was).values(row))).rowcount > 0
                except IntegrityError:
                    return False

    async def delete(self, shelf: Shelf, names: Sequence[str]) -> int:
        gone = delete(table).where(self._on(shelf), table.c.name.in_([escaped(name) for name in names]))
        with translated():
            async with asyncio.timeout(self._timeout_s):
                await self._ready()
                async with self._engine.begin() as connection:
                    count = (await connection.execute(gone)).rowcount
                if self._sqlite:
                    await self._checkpoint()
                return count

    async def adopt(self, shelf: Shelf) -> Sequence[str]:
        place = {"b_scope": self._scope, "b_kind": shelf.kind, "b_tenant": escaped(shelf.tenant)}
        with translated():
            async with asyncio.timeout(self._timeout_s):
                await self._ready()
                async with self._engine.begin() as connection:
                    now_s = (await connection.execute(now(sqlite=self._sqlite))).scalar_one()
                    found = (await connection.execute(_ADOPT, {**place, "b_now_s": now_s})).scalars().all()
        return sorted(plain(name) for name in found)

    async def shelves(self, kind: str) -> Sequence[str]:
        query = select(table.c.tenant).where(table.c.scope == self._scope, table.c.kind == kind).distinct()
        with translated():
            async with asyncio.timeout(self._timeout_s):
                await self._ready()
                async with self._engine.connect() as connection:
                    return sorted(plain(name) for name in (await connection.execute(query)).scalars())

    async def trim(self, kind: str, before_us: int, count_max: int, bytes_max: int) -> int:
        mine = and_(table.c.scope == self._scope, table.c.kind == kind)
        with translated():
            async with asyncio.timeout(self._timeout_s):
                await self._ready()
                async with self._engine.begin() as connection:
                    gone = (await connection.execute(delete(table).where(mine, table.c.at_us < before_us))).rowcount
        while (more := await self._make_room(kind, count_max, bytes_max)) > 0:
            gone += more
        return gone

    async def close(self) -> None:
        """What waits is written first, if it can be soon."""
        try:
            async with asyncio.timeout(CLOSE_S):
                if self._writing is not None:
                    await asyncio.wait((self._writing,))
                await self._engine.dispose()
        except TimeoutError:
            pass

    # --- how ------------------------------------------------------------------------------------------------

    async def _ready(self) -> None:
        if self._migrated:
            return
        async with self._migrating:
            if not self._migrated:
                if self._sqlite:
                    make_file(self._url)
                await migrate(self._engine)
                self._migrated = True

    def _on(self, shelf: Shelf) -> Any:
        return and_(table.c.scope == self._scope, table.c.kind == shelf.kind, table.c.tenant == escaped(shelf.tenant))

    async def _names(
        self,
        connection: AsyncConnection,
        shelf: Shelf,
        tags: Mapping[str, str],
        after: Mark | None,
        limit: int,
        *,
        newest_first: bool,
    ) -> Sequence[str]:
        """Of those that are looked for, as the table has them."""
        at, name = table.c.at_us, table.c.name
        order = (at.desc(), name.desc()) if newest_first else (at, name)
        query = select(name, at, table.c.tags, table.c.nbytes).where(self._on(shelf)).order_by(*order).limit(LOOKED_AT)
        found: list[tuple[str, int]] = []
        mark = None if after is None else Mark(after.at_us, escaped(after.name))
        while len(found) < limit:
            page = query
            if mark is not None:
                beyond = (at < mark.at_us, name < mark.name) if newest_first else (at > mark.at_us, name > mark.name)
                page = query.where(or_(beyond[0], and_(at == mark.at_us, beyond[1])))
            rows = (await connection.execute(page)).all()
            found += [(row[0], row[3]) for row in rows if not tags or tags.items() <= _tags(row[2]).items()]
            if len(rows) < LOOKED_AT:
                break
            mark = Mark(rows[-1][1], rows[-1][0])
        return [name for name, _ in found[: min(limit, fitting(size for _, size in found))]]

    async def _checkpoint(self) -> None:
        """What was deleted is in the log no more, either."""
        async with self._engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))

    async def _write(self) -> None:
        """One transaction after the other, as long as something waits."""
        try:
            while self._waiting:
                await self._write_some(self._some())
        finally:
            self._writing = None

    def _some(self) -> Sequence[_Waiting]:
        nbytes = count = 0
        while count < len(self._waiting) and nbytes < WRITTEN_BYTES:
            nbytes += len(self._waiting[count].document.body)
            count += 1
        some, self._waiting = self._waiting[:count], self._waiting[count:]
        return some

    async def _write_some(self, some: Sequence[_Waiting]) -> None:
        rows = {
            (each.shelf, each.document.name): self._row(each.shelf, each.document) for each in some
        }  # of one name the last
        try:
            with translated():
                async with asyncio.timeout(self._timeout_s):
                    await self._ready()
                    async with self._engine.begin() as connection:
                        # In order: else two who write the same names could wait for each other.
                        await connection.execute(_PUT[self._engine.dialect.name], [rows[at] for at in sorted(rows)])
        except RecordsLost as error:
            for each in some:
                if not each.written.done():
                    each.written.set_exception(RecordsLost(str(error)))
        else:
            for each in some:
                if not each.written.done():
                    each.written.set_result(None)

    def _row(self, shelf: Shelf, document: Document) -> dict[str, Any]:
        return {
            "scope": self._scope,
            "kind": shelf.kind,
            "tenant": escaped(shelf.tenant),
            "name": escaped(document.name),
            "at_us": document.at_us,
            "tags": _encode(document.tags).decode(),
            "nbytes": len(document.body),
            "body": document.body,
        }

    async def _make_room(self, kind: str, count_max: int, bytes_max: int) -> int:
        """How many went of the tenant that has most; 0: there is room."""
        mine = and_(table.c.scope == self._scope, table.c.kind == kind)
        sizes = select(table.c.tenant, func.count(), func.sum(table.c.nbytes)).where(mine).group_by(table.c.tenant)
        with translated():
            async with asyncio.timeout(self._timeout_s):
                async with self._engine.begin() as connection:
                    has = {tenant: (int(count), int(size)) for tenant, count, size in await connection.execute(sizes)}
                    excess = in_excess(has, count_max, bytes_max)
                    if excess is None:
                        return 0
                    theirs = and_(mine, table.c.tenant == excess[0])
                    oldest = select(table.c.name, table.c.nbytes).where(theirs)
                    oldest = oldest.order_by(table.c.at_us, table.c.name).limit(TRIMMED)
                    rows = (await connection.execute(oldest)).all()
                    names = cut([(row[0], row[1]) for row in rows], *excess[1:])
                    gone = delete(table).where(theirs, table.c.name.in_(names))
                    return (await connection.execute(gone)).rowcount


def _document(row: Row[Any, Any, Any, Any]) -> Document:
    name, at_us, tags, body = row
    return Document(plain(name), at_us, _tags(tags), body)
