"""Opens a database, SQLite's or PostgreSQL's, and brings its tables to what this version needs."""

import logging
import sqlite3
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from records.schema import HEAD

BUSY_S = 5.0
"""How long one waits for another process that has the file."""
LOCK = 0x7261636568617574
"""PostgreSQL's advisory lock of who brings the tables up to date."""
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
"""As libpq has them."""


class BadDatabase(ValueError):
    """It names no database that could be used."""


def database_url(database: str, default: Path) -> URL:
    """Where the rows are: ``postgresql://user:password@host:port/name``, or empty: SQLite's file at ``default``.
    After it ``?sslmode=`` and ``?host=`` are understood as libpq does.

    Raises:
        BadDatabase: it is neither.
    """
    if not database:
        return URL.create("sqlite+aiosqlite", database=str(default))
    try:
        url = make_url(database)
    except (ArgumentError, ValueError) as error:
        raise BadDatabase("database is no URL: write postgresql://user:password@host:port/name") from error
    if url.drivername != "postgresql" or not url.database:
        raise BadDatabase(f"database is {url.render_as_string()!r}: write postgresql://user:password@host:port/name")
    query = dict(url.query)
    mode = query.pop("sslmode", None)
    if mode not in (None, *SSL_MODES):
        raise BadDatabase(f"database has sslmode={mode}: write one of {', '.join(SSL_MODES)}")
    if more := query.keys() - {"host"}:
        raise BadDatabase(f"database has `{min(more)}`, which means nothing here: write sslmode, host or nothing")
    ssl = {"ssl": mode} if mode is not None else {}
    return url.set(drivername="postgresql+asyncpg", query={**query, **ssl})


def engine_of(url: URL, timeout_s: float) -> AsyncEngine:
    """An engine with one connection, which is made when it is needed. PostgreSQL takes back a transaction whose process
    stands still, and what it has locked, so that those who wait for that have it within ``timeout_s``."""
    if url.get_backend_name() == "sqlite":
        made = create_async_engine(url, pool_size=1, max_overflow=0, connect_args={"timeout": BUSY_S})
        event.listen(made.sync_engine, "connect", _set_up)
        return made
    # The host may be a folder of a socket, as libpq has it; a server that is gone is noticed at the next use.
    made = create_async_engine(
        url, pool_size=1, max_overflow=0, pool_pre_ping=True, connect_args={"timeout": timeout_s}
    )
    event.listen(made.sync_engine, "connect", partial(_limit, timeout_s / 2))
    return made


def make_file(url: URL) -> None:
    """SQLite's file is there, and nobody else's to read: it has what is said in traces. Raises OSError."""
    assert url.database is not None
    path = Path(url.database)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)


async def migrate(engine: AsyncEngine, to: str = HEAD) -> None:
    """The tables are as this version needs them. Alembic is only loaded where they are not."""
    async with engine.connect() as connection:
        if await connection.run_sync(_version) == to:
            return
    async with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            await connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK})"))
        else:  # said here, as SQLite's driver begins nothing for what makes tables: all of it, or nothing
            await connection.execute(text("BEGIN IMMEDIATE"))
        await connection.run_sync(partial(_upgrade, to))


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _upgrade(to: str, connection: Connection) -> None:
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it has much to say when it is imported
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    command.upgrade(config, to)


def _set_up(connection: Any, _: object) -> None:
    cursor: sqlite3.Cursor = connection.cursor()
    # Full: durable when it is told. What is erased is overwritten.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "wal_autocheckpoint=1000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _limit(still_s: float, connection: Any, _: object) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET idle_in_transaction_session_timeout = {int(still_s * 1000)}")
    cursor.close()
    connection.commit()
