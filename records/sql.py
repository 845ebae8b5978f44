"""The rows in a database."""

import asyncio
from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import contextmanager

from sqlalchemy import and_, bindparam, delete, insert, select, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from records.base import Batch, RecordsLost, TraceName, TraceRow
from records.database import engine_of, make_file, migrate
from records.schema import trace_changes as changes

READ_ROWS = 500
"""Read at a time."""
CLOSE_S = 2.0
"""A server that is frozen takes no leave."""

_INSERT = insert(changes)
_MINE = and_(
    changes.c.router == bindparam("b_router"),
    changes.c.tenant == bindparam("b_tenant"),
    changes.c.trace == bindparam("b_trace"),
)
_ERASE = delete(changes).where(_MINE)
_SUPERSEDE = delete(changes).where(_MINE, changes.c.number < bindparam("b_number"))


class SqlRecords:
    """Implements :class:`records.base.Records`. Nothing is opened before it is needed.

    Args:
        url: the database's: see :func:`records.database.database_url`.
        router: whose rows.
        timeout_s: what a write, or a part of what is read, may take.
    """

    def __init__(self, url: URL, router: str, timeout_s: float) -> None:
        self._url = url
        self._router = router
        self._timeout_s = timeout_s
        self._engine = engine_of(url, timeout_s)
        self._sqlite = url.get_backend_name() == "sqlite"
        self._migrated = False

    async def write(self, batch: Batch) -> None:
        with _translated():
            async with asyncio.timeout(self._timeout_s):
                await self._ready()
                async with self._engine.begin() as connection:
                    await self._write(connection, batch)
                if batch.erased and self._sqlite:
                    await self._checkpoint()

    async def rows(self) -> AsyncIterator[Sequence[TraceRow]]:
        query = (
            select(changes.c.tenant, changes.c.trace, changes.c.number, changes.c.version, changes.c.body)
            .where(changes.c.router == self._router)
            .order_by(changes.c.number)
            .limit(READ_ROWS)
        )
        after = -1
        while True:
            with _translated():
                async with asyncio.timeout(self._timeout_s):
                    await self._ready()
                    async with self._engine.connect() as connection:
                        found = (await connection.execute(query.where(changes.c.number > after))).all()
            if not found:
                return
            yield [TraceRow(_plain(row[0]), _plain(row[1]), *row[2:]) for row in found]
            after = found[-1][2]

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

    async def _write(self, connection: AsyncConnection, batch: Batch) -> None:
        router = self._router
        if batch.erased:
            await connection.execute(_ERASE, [self._named(name) for name in batch.erased])
        if batch.rows:
            rows = [
                {"router": router, **row._asdict(), "tenant": _kept(row.tenant), "trace": _kept(row.trace)}
                for row in batch.rows
            ]
            await connection.execute(_INSERT, rows)
        if batch.superseded:
            old = [{**self._named(name), "b_number": number} for name, number in batch.superseded]
            await connection.execute(_SUPERSEDE, old)

    def _named(self, name: TraceName) -> dict[str, object]:
        return {"b_router": self._router, "b_tenant": _kept(name.tenant), "b_trace": _kept(name.trace)}

    async def _checkpoint(self) -> None:
        """What was erased is in the log no more, either."""
        async with self._engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))


def _kept(text: str) -> str:
    """A client's text as a database takes it: PostgreSQL has no character of number 0."""
    return text.replace("\x1b", "\x1b1").replace("\0", "\x1b0")


def _plain(text: str) -> str:
    """Inverse of :func:`_kept`."""
    return text.replace("\x1b0", "\0").replace("\x1b1", "\x1b")


@contextmanager
def _translated() -> Generator[None, None, None]:
    try:
        yield
    except TimeoutError as error:
        raise RecordsLost("it does not answer in time") from error
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise RecordsLost(str(cause).splitlines()[0] if str(cause) else type(cause).__name__) from error
    except OSError as error:
        raise RecordsLost(str(error)) from error
