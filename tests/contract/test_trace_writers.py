"""Who writes a trace where several routers share their rows, whatever keeps these."""

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from records.base import Batch, Claim, Holder, Marks, Records, TraceName
from records.database import database_url, engine_of, migrate
from records.sql import SqlRecords
from tests.contract.test_records import A, B, Made, all_of, batch, made, on_a_loop, row, sql
from tests.postgres import Postgres

__all__ = ["made"]
pytestmark = pytest.mark.xdist_group("postgres")

TIP, LATER = b"t" * 16, b"u" * 16


async def close(*records: Records) -> None:
    for one in records:
        await one.close()


@on_a_loop
async def test_who_lost_a_trace_cannot_write_over_the_newer_ones_rows(made: Made) -> None:
    one, two = made("s", "one"), made("s", "two")
    await one.write(batch(row(A, 1), row(B, 1)))
    assert await two.claim(A) == Claim(*A, 2)
    assert await two.claim(TraceName("", "never")) is None
    mixed = Batch([row(A, 2), row(B, 2)], [(Claim(*name, 1), Marks()) for name in (A, B)], [(A, 2), (B, 2)])
    assert await one.write(mixed) == {A}
    assert await all_of(one) == [row(A, 1), row(B, 2)]
    assert await one.write(batch(erased=[A])) == {A}  # nor erase them
    assert await two.write(batch(row(A, 2, b"newer"), fence=2)) == frozenset()
    assert await one.write(batch(row(A, 3))) == {A}  # nor think that it is new
    assert await all_of(one, A) == [row(A, 1), row(A, 2, b"newer")]
    assert await one.claim(A) == Claim(*A, 3)
    assert await two.write(batch(row(A, 3), fence=2)) == {A}
    assert await one.write(batch(row(A, 3), fence=3)) == frozenset()
    await close(one, two)


@on_a_loop
async def test_what_nobody_living_has_is_adopted_once(made: Made) -> None:
    one, two, three = (made("s", name) for name in ("one", "two", "three"))
    for records in (one, two, three):
        await records.live(60.0)
    assert sorted(await one.live(60.0)) == ["three", "two"]
    assert (await two.live(60.0))["one"] == (await three.live(60.0))["one"] != ""
    await one.write(batch(row(A, 1), row(B, 1)))
    assert await two.adopt(others=True, all_mine=False) == []
    await one.live(0.0)
    assert list(await two.live(60.0)) == ["three"]
    found = sorted(await two.adopt(others=True, all_mine=False))
    assert found == [Claim(*A, 2), Claim(*B, 2)]
    assert await three.adopt(others=True, all_mine=False) == []
    assert await two.adopt(others=True, all_mine=False) == []
    assert sorted(await two.adopt(others=True, all_mine=True)) == found
    assert await one.write(batch(row(A, 2), fence=1)) == {A}
    await close(one, two, three)


@on_a_loop
async def test_a_next_life_has_what_the_last_one_had_and_that_one_nothing_more(made: Made) -> None:
    one, two = made("s", "r", "1"), made("s", "r", "2")
    await one.live(60.0)
    await one.write(batch(row(A, 1)))
    await two.live(60.0)
    assert await two.adopt(others=True, all_mine=True) == [Claim(*A, 2)]
    assert await one.write(batch(row(A, 2), fence=1)) == {A}
    assert await two.write(batch(row(A, 2, b"two"), fence=2)) == frozenset()
    assert await all_of(two) == [row(A, 1), row(A, 2, b"two")]
    await close(one, two)


@on_a_loop
async def test_a_trace_is_found_by_its_name_its_conversation_and_its_answer(made: Made) -> None:
    one, two = made("s", "one"), made("s", "two")
    await one.live(60.0)
    marks = {A: Marks(TIP, ("r-a", "h-a")), B: Marks(LATER, ("r-b", ""))}
    await one.write(Batch([row(A, 1), row(B, 1)], [(Claim(*name, 0), mark) for name, mark in marks.items()]))
    held = Holder(*A, "one", "one:7000", lives=True)
    assert await two.holder("", "a") == held
    assert await two.holder("", "", [TIP, b"x" * 16, LATER]) == held  # the other is another tenant's
    for answer in ("r-a", "h-a"):
        assert await two.holder("", "", [], answer) == held
    for tenant, name, tips, answer in (("", "b", [], ""), ("red", "x", [TIP], "h-a"), ("", "", [], "")):
        assert await two.holder(tenant, name, tips, answer) is None
    later = Marks(LATER, ("r2", "h2"))
    await one.write(Batch([row(A, 2)], [(Claim(*A, 1), later)]))
    assert await two.holder("", "", [TIP]) is None
    assert await two.holder("", "", [TIP, LATER], "h-a") == held
    await one.live(0.0)
    assert await two.holder("", "a") == held._replace(lives=False)
    await close(one, two)


@on_a_loop
async def test_what_is_erased_of_a_tenant_comes_from_nobody_again(made: Made) -> None:
    one, two = made("s", "one"), made("s", "two")
    await one.write(batch(row(A, 1), row(B, 1)))
    assert await two.erase("red") == 1
    assert await one.write(batch(row(B, 2), fence=1)) == {B}
    assert await all_of(two) == [row(A, 1)]
    await close(one, two)


@on_a_loop
async def test_two_who_claim_at_once_have_it_one_after_the_other(made: Made) -> None:
    several = [made("s", f"r{at}") for at in range(4)]
    await several[0].write(batch(row(A, 1)))
    claims = await asyncio.gather(*(records.claim(A) for records in several))
    fences = [claim.fence for claim in claims if claim is not None]
    assert sorted(fences) == [2, 3, 4, 5]
    lost = [
        await records.write(batch(row(A, fence), fence=fence)) for records, fence in zip(several, fences, strict=True)
    ]
    assert [found == frozenset() for found in lost] == [fence == 5 for fence in fences]
    await close(*several)


@on_a_loop
async def test_who_stands_still_in_a_transaction_holds_nobody_up_for_long(server: Postgres, tmp_path: Path) -> None:
    url, timeout_s = database_url(server.create("still"), tmp_path), 3.0
    one, two = (SqlRecords(url, "s", name, "1", f"{name}:7000", timeout_s) for name in ("one", "two"))
    await one.write(batch(row(A, 1)))
    still = engine_of(url, timeout_s)
    async with still.connect() as connection:
        await connection.execute(text("SELECT * FROM trace_heads FOR UPDATE"))
        assert await two.claim(A) == Claim(*A, 2)
        with pytest.raises(DBAPIError):
            await connection.execute(text("SELECT 1"))
    await still.dispose()
    await close(one, two)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_rows_of_before_are_the_clusters(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    server: Postgres | None = request.getfixturevalue("server") if kind == "postgresql" else None
    url = database_url(server.create("before") if server is not None else "", tmp_path / "r.sqlite")
    scope, routers = ("c", ("c/router-0", "c/router-1", "d/router-0")) if server is not None else ("r", ("r",))

    async def main() -> None:
        engine = engine_of(url, 20.0)
        await migrate(engine, "0005")
        async with engine.begin() as connection:
            for router in routers:
                for number in (1, 2):
                    await connection.execute(
                        text("INSERT INTO trace_changes VALUES (:router, :number, '', 'a', 1, :body)").bindparams(
                            router=router, number=number, body=f"{router} {number}".encode()
                        )
                    )
        await engine.dispose()
        records: SqlRecords = sql(url, scope, "router-9")
        assert await records.adopt(others=True, all_mine=True) == [Claim(*A, 1)]
        last = routers[min(1, len(routers) - 1)]
        assert [row.body.decode() for row in await all_of(records)] == [f"{last} 1", f"{last} 2"]
        assert not await records.write(batch(row(A, 3), fence=1))
        await records.close()

    asyncio.run(main())
