"""What keeps rows, whichever it is: SQLite, PostgreSQL, memory."""

import asyncio
import functools
import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.engine import URL

from records import database
from records.base import Batch, Claim, Marks, Records, RecordsLost, TraceName, TraceRow
from records.database import BadDatabase, database_url
from records.fakes import MemoryRecords, MemoryTables
from records.schema import HEAD
from records.sql import CLOSE_S, SqlRecords
from tests.postgres import Postgres

pytestmark = pytest.mark.xdist_group("postgres")

TIMEOUT_S = 20.0
A, B = TraceName("", "a"), TraceName("red", "a")
Made = Callable[..., Records]


def on_a_loop(test: Callable[..., Coroutine[object, object, None]]) -> Callable[..., None]:
    """A test that is a coroutine."""

    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


names = (f"d{number}" for number in itertools.count())


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    """Opens a scope's rows for a life of a router; of the same scope: the same ones."""
    match request.param:
        case "memory":
            known: dict[str, MemoryTables] = {}
            return lambda scope, router="r", life="1": MemoryRecords(
                known.setdefault(scope, MemoryTables()), router, life, f"{router}:7000"
            )
        case "sqlite":
            url = database_url("", tmp_path / "records" / "r.sqlite")
        case _:
            url = database_url(request.getfixturevalue("server").create(next(names)), tmp_path)
    return lambda scope, router="r", life="1": sql(url, scope, router, life)


def sql(url: URL, scope: str = "s", router: str = "r", life: str = "1") -> SqlRecords:
    return SqlRecords(url, scope, router, life, f"{router}:7000", TIMEOUT_S)


def row(name: TraceName, number: int, body: bytes = b"x") -> TraceRow:
    return TraceRow(*name, number, 1, body)


def batch(*rows: TraceRow, fence: int = 0, erased: Sequence[TraceName] = (), superseded: Any = ()) -> Batch:
    """With claims of one fence."""
    claims = {(row.tenant, row.trace): (Claim(row.tenant, row.trace, fence), Marks()) for row in rows}
    return Batch(rows, list(claims.values()), superseded, [Claim(*name, max(1, fence)) for name in erased])


async def all_of(records: Records, *names: TraceName) -> list[TraceRow]:
    return [row async for rows in records.rows(names or (A, B)) for row in rows]


def files(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.iterdir())


async def opened(made: Made, scope: str) -> AsyncIterator[Records]:
    records = made(scope)
    try:
        yield records
    finally:
        await records.close()


@on_a_loop
async def test_rows_outlive_who_wrote_them_in_their_order(made: Made) -> None:
    wrote = [row(A, 1, bytes(range(256)) * 4000), row(A, 3, b""), row(B, 2)]
    async with aclosing(opened(made, "s")) as one:
        records = await anext(one)
        assert await all_of(records) == []
        assert not await records.write(batch(wrote[0], wrote[2]))
        assert not await records.write(batch(wrote[1], fence=1))
        assert not await records.write(Batch())
    async with aclosing(opened(made, "s")) as one:
        records = await anext(one)
        assert await all_of(records) == wrote
        assert await all_of(records, B, TraceName("", "never")) == wrote[2:]


@on_a_loop
async def test_more_rows_than_are_read_at_once(made: Made) -> None:
    traces = [TraceName("", f"t{at:03}") for at in range(90)]
    wrote = [row(name, number, b"%d" % number) for name in traces for number in range(1, 13)]
    wrote += [row(TraceName("", "t9"), number) for number in range(1, 450)]
    async with aclosing(opened(made, "s")) as one:
        records = await anext(one)
        assert not await records.write(batch(*wrote))
        assert await all_of(records, *traces, TraceName("", "t9")) == wrote


@on_a_loop
async def test_what_goes_while_rows_are_read_hides_none_of_the_others(made: Made) -> None:
    long, after = TraceName("", "long"), TraceName("", "long after")
    async with aclosing(opened(made, "s")) as one, aclosing(opened(made, "s")) as two:
        records, writer = await anext(one), await anext(two)
        await writer.write(batch(*(row(long, number) for number in range(1, 500)), row(after, 1), row(after, 2)))
        found: list[TraceRow] = []
        async for rows in records.rows([long, after]):
            if not found:  # it is written whole meanwhile
                await writer.write(batch(row(long, 500, b"whole"), fence=1, superseded=[(long, 500)]))
            found += rows
        assert found[-2:] == [row(after, 1), row(after, 2)]


@on_a_loop
async def test_what_is_superseded_or_erased_is_gone_and_nothing_else(made: Made) -> None:
    async with aclosing(opened(made, "s")) as one, aclosing(opened(made, "other")) as two:
        records, other = await anext(one), await anext(two)
        await records.write(batch(row(A, 1), row(B, 2), row(A, 3)))
        await other.write(batch(row(A, 1), row(B, 2)))
        await records.write(batch(row(A, 4), fence=1, superseded=[(A, 4)]))
        assert await all_of(records) == [row(A, 4), row(B, 2)]
        never = TraceName("", "never")
        assert await records.write(batch(erased=[A, B, never])) == {never}
        await records.write(batch(row(B, 5)))
        assert await all_of(records) == [row(B, 5)]
        assert await all_of(other) == [row(A, 1), row(B, 2)]
        assert await other.erase("red") == 1
        assert await all_of(other) == [row(A, 1)]
        assert await all_of(records) == [row(B, 5)]


@on_a_loop
async def test_names_are_any_text(made: Made) -> None:
    odd = [TraceName("a\0b", "\0"), TraceName("a\x1b0b", "\x1b"), TraceName("a\x1bb", "\x1b1\\"), TraceName("ab", "ü")]
    async with aclosing(opened(made, "s")) as one:
        records = await anext(one)
        wrote = [row(name, at) for at, name in enumerate(odd, 1)]
        await records.write(batch(*wrote))
        assert sorted(await all_of(records, *odd)) == sorted(wrote)
        for at, name in enumerate(odd, 1):
            assert not await records.write(batch(row(A, 9 + at), fence=1 if at > 1 else 0, erased=[name]))
            assert await all_of(records, name) == []
            assert (await records.holder(name.tenant, name.trace)) is None


@on_a_loop
async def test_a_batch_is_written_whole_or_not_at_all(made: Made) -> None:
    async with aclosing(opened(made, "s")) as one:
        records = await anext(one)
        await records.write(batch(row(A, 1)))
        with pytest.raises((RecordsLost, AssertionError)):
            await records.write(batch(row(B, 2), row(A, 1), erased=[]))
        assert await all_of(records) == [row(A, 1)]
        assert await records.holder(*B) is None


@on_a_loop
async def test_a_server_that_went_away_is_lost_and_found_again(server: Postgres, tmp_path: Path) -> None:
    records = sql(database_url(server.create(next(names)), tmp_path))
    await records.write(batch(row(A, 1)))
    server.stop()
    try:
        with pytest.raises(RecordsLost):
            await records.write(batch(row(A, 2), fence=1))
        with pytest.raises(RecordsLost):
            await all_of(records)
    finally:
        await asyncio.to_thread(server.start)
    await records.write(batch(row(A, 3), fence=1))
    assert await all_of(records) == [row(A, 1), row(A, 3)]
    await records.close()


def stop(database: str, how: signal.Signals) -> int:
    """Tells those of a server's processes that serve a database; returns how many these are."""
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"postgres: tracehaul {database} ".encode() in (folder / "cmdline").read_bytes():
                os.kill(int(folder.name), how)
                found += 1
    return found


@on_a_loop
async def test_a_server_that_is_frozen_holds_up_nobody(server: Postgres, tmp_path: Path) -> None:
    name = next(names)
    records = sql(database_url(server.create(name), tmp_path))
    await records.write(batch(row(A, 1)))
    assert stop(name, signal.SIGSTOP) == 1
    try:
        async with asyncio.timeout(2 * CLOSE_S):
            await records.close()
    finally:
        stop(name, signal.SIGCONT)


@on_a_loop
async def test_what_a_server_refuses_is_lost(server: Postgres, tmp_path: Path) -> None:
    for url in (server.url("never"), server.create(next(names)) + "?sslmode=require"):
        records = sql(database_url(url, tmp_path))
        with pytest.raises(RecordsLost):
            await records.write(batch(row(A, 1)))
        await records.close()


@on_a_loop
async def test_two_bring_an_empty_database_up_to_date_at_once(server: Postgres, tmp_path: Path) -> None:
    url = database_url(server.create(next(names)), tmp_path)
    both = [sql(url, name) for name in ("r", "s")]
    await asyncio.gather(*(one.write(batch(row(A, 1))) for one in both))
    assert [await all_of(one) for one in both] == [[row(A, 1)]] * 2
    for one in both:
        await one.close()


@on_a_loop
async def test_what_was_erased_is_nowhere_in_the_files(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    records = sql(database_url("", path))
    await records.write(batch(row(A, 1, b"a secret" * 1000)))
    assert path.stat().st_mode & 0o777 == 0o600
    assert b"a secret" in files(tmp_path)
    await records.write(batch(erased=[A]))
    assert b"a secret" not in files(tmp_path)
    await records.close()


@on_a_loop
async def test_a_file_that_is_none_is_lost_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    path.write_bytes(b"this is no database, whatever it is" * 1000)
    records = sql(database_url("", path))
    with pytest.raises(RecordsLost):
        await all_of(records)
    with pytest.raises(RecordsLost):
        await sql(database_url("", Path(os.devnull) / "r")).write(Batch())
    await records.close()


def test_the_newest_migration_is_the_one_that_is_asked_for() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


@pytest.mark.parametrize(
    "named", ["mysql://a/b", "postgresql://host", "a file", "postgresql+psycopg://h/d", "postgresql://h:x/d"]
)
def test_what_is_no_database_is_refused(named: str) -> None:
    with pytest.raises(BadDatabase, match="write postgresql://"):
        database_url(named, Path("r.sqlite"))


def test_what_follows_a_database_is_understood_or_refused() -> None:
    plain = "postgresql://me@h/d"
    assert dict(database_url(plain + "?sslmode=verify-full&host=/tmp", Path("r")).query) == {
        "ssl": "verify-full", "host": "/tmp",
    }  # fmt: skip
    for query in ("ssl=require", "sslmode=yes", "sslmode=require&sslmode=require", "application_name=x"):
        with pytest.raises(BadDatabase, match=query.split("=")[0]):
            database_url(f"{plain}?{query}", Path("r"))


def test_a_password_is_told_nobody() -> None:
    with pytest.raises(BadDatabase) as refused:
        database_url("mysql://me:hidden@host/db", Path("r.sqlite"))
    assert "hidden" not in str(refused.value)
