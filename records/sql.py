"""The rows in a database."""

import asyncio
from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import contextmanager

from sqlalchemy import and_, bindparam, delete, insert, select, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from records.base import Batch, RecordsLost, TraceRow
from records.database import engine_of, make_file, migrate
from records.schema import trace_changes as changes

READ_ROWS = 500
"""Read at a time."""

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
            yield [TraceRow(*row) for row in found]
            after = found[-1][2]

    async def close(self) -> None:
        await self._engine.dispose()

    async def _ready(self) -> None:
        if not self._migrated:
            if self._sqlite:
                make_file(self._url)
            await migrate(self._engine)
            self._migrated = True

    async def _write(self, connection: AsyncConnection, batch: Batch) -> None:
        router = self._router
        if batch.erased:
            gone = [{"b_router": router, "b_tenant": name.tenant, "b_trace": name.trace} for name in batch.erased]
            await connection.execute(_ERASE, gone)
        if batch.rows:
            await connection.execute(_INSERT, [{"router": router, **row._asdict()} for row in batch.rows])
        if batch.superseded:
            old = [
                {"b_router": router, "b_tenant": name.tenant, "b_trace": name.trace, "b_number": number}
                for name, number in batch.superseded
            ]
            await connection.execute(_SUPERSEDE, old)

    async def _checkpoint(self) -> None:
        """What was erased is in the log no more, either."""
        async with self._engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))


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
