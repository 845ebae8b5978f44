"""What keeps documents, whichever it is: SQLite, PostgreSQL, memory."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

from records.base import RecordsLost
from records.database import database_url
from records.documents import LIST_BYTES_MAX, Document, Documents, Mark, Shelf
from records.documents_sql import LOOKED_AT, SqlDocuments
from records.fakes import MemoryDocuments
from tests.contract.test_records import files, on_a_loop, sql
from tests.postgres import Postgres

pytestmark = pytest.mark.xdist_group("postgres")

TIMEOUT_S = 20.0
OURS, THEIRS, OTHER = Shelf("chat", ""), Shelf("chat", "red\0\x1b"), Shelf("hook", "")
Made = Callable[[str], Documents]
numbers = itertools.count()


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    """Opens one scope's documents; of the same name: the same ones."""
    match request.param:
        case "memory":
            known: dict[str, MemoryDocuments] = {}
            return lambda scope: known.setdefault(scope, MemoryDocuments())
        case "sqlite":
            url = database_url("", tmp_path / "records" / "r.sqlite")
        case _:
            url = database_url(request.getfixturevalue("server").create(f"doc{next(numbers)}"), tmp_path)
    return lambda scope: SqlDocuments(url, scope, TIMEOUT_S)


def doc(at: int, body: bytes = b"x", **tags: str) -> Document:
    return Document(f"n{at:04}", 1_000 + at, tags, body)


async def keep(documents: Documents, shelf: Shelf, *new: Document) -> None:
    await asyncio.gather(*(documents.put(shelf, each) for each in new))


async def names(documents: Documents, shelf: Shelf = OURS) -> Sequence[str]:
    return [each.name for each in await documents.list(shelf, {}, None, 10_000)]


@on_a_loop
async def test_what_was_put_outlives_who_put_it_on_its_own_shelf(made: Made) -> None:
    odd = Document("a\0b", 5, {"k\0": "v\x1b", "": "ü"}, bytes(range(256)))
    one, other = made("s"), made("t")
    await keep(one, OURS, doc(1, model="a"), odd)
    await keep(one, THEIRS, doc(1, b"theirs"))
    await keep(one, OTHER, doc(1, b"other"))
    await keep(other, OURS, doc(1, b"elsewhere"))
    await one.close()
    one = made("s")
    assert await one.get(OURS, "n0001") == doc(1, model="a")
    assert await one.get(OURS, odd.name) == odd
    assert await one.get(OURS, "never") is None
    assert [(await one.get(shelf, "n0001") or odd).body for shelf in (THEIRS, OTHER)] == [b"theirs", b"other"]
    assert await one.list(OURS, {}, None, 9) == [odd, doc(1, model="a")]
    assert await one.delete(THEIRS, ["n0001", "never"]) == 1
    assert (await one.get(THEIRS, "n0001"), await one.get(OURS, "n0001")) == (None, doc(1, model="a"))
    await one.close()
    await other.close()


@on_a_loop
async def test_one_is_swapped_by_who_knows_its_tags(made: Made) -> None:
    one = made("s")
    assert not await one.swap(OURS, doc(1), {})
    assert await one.swap(OURS, doc(1, b"a", epoch="1", live="1"), None)
    assert not await one.swap(OURS, doc(1, b"b"), None)
    assert not await one.swap(OURS, doc(1, b"b"), {"epoch": "1"})
    assert not await one.swap(THEIRS, doc(1, b"b"), {"live": "1", "epoch": "1"})
    assert await one.get(OURS, "n0001") == doc(1, b"a", epoch="1", live="1")
    swaps = [one.swap(OURS, doc(1, b"c", epoch=str(at)), {"live": "1", "epoch": "1"}) for at in range(2, 10)]
    assert sum(await asyncio.gather(*swaps)) == 1, "of several who would one does"
    assert (await one.get(OURS, "n0001") or doc(1)).body == b"c"
    await one.close()


@on_a_loop
async def test_putting_again_replaces_and_tags_change_alone(made: Made) -> None:
    one = made("s")
    await one.put(OURS, doc(1, b"old", a="1"))
    await keep(one, OURS, doc(2), doc(1, b"older"), doc(1, b"new", a="2"))
    assert await one.get(OURS, "n0001") == doc(1, b"new", a="2")
    assert await one.tag(OURS, "n0001", {"b": "3"})
    assert await one.get(OURS, "n0001") == doc(1, b"new", b="3")
    assert not await one.tag(OURS, "never", {})
    assert await names(one) == ["n0001", "n0002"]
    await one.close()


@on_a_loop
async def test_lists_go_on_after_a_mark_in_both_directions(made: Made) -> None:
    one = made("s")
    all_ = [doc(at, parity=str(at % 2), seldom=str(at == 7)) for at in range(LOOKED_AT + 20)]
    await keep(one, OURS, *all_)
    assert await one.list(OURS, {}, None, 3) == all_[:3]
    assert await one.list(OURS, {}, all_[2].mark, 2) == all_[3:5]
    assert await one.list(OURS, {"parity": "1"}, all_[2].mark, 2) == [all_[3], all_[5]]
    assert await one.list(OURS, {"parity": "1"}, all_[9].mark, 2, newest_first=True) == [all_[7], all_[5]]
    assert await one.list(OURS, {"seldom": "True"}, None, 5, newest_first=True) == [all_[7]]
    assert await one.list(OURS, {"parity": "1", "seldom": "x"}, None, 5) == []
    assert await one.list(OURS, {}, Mark(all_[4].at_us, "n"), 1) == [all_[4]]
    await one.close()


@on_a_loop
async def test_a_list_of_long_ones_is_cut(made: Made) -> None:
    one = made("s")
    long = [doc(at, bytes(LIST_BYTES_MAX // 2)) for at in range(3)] + [doc(3, bytes(LIST_BYTES_MAX + 1)), doc(4)]
    for each in long:
        await one.put(OURS, each)
    assert [each.name for each in await one.list(OURS, {}, None, 5)] == ["n0000", "n0001"]
    assert [each.name for each in await one.list(OURS, {}, long[2].mark, 5)] == ["n0003"]
    assert [each.name for each in await one.list(OURS, {}, long[3].mark, 5)] == ["n0004"]
    await one.close()


@on_a_loop
async def test_the_old_and_the_oldest_of_whoever_has_most_go(made: Made) -> None:
    one = made("s")
    await keep(one, OURS, *[doc(at, b"12345") for at in range(10)])
    await keep(one, THEIRS, *[doc(at, b"1") for at in range(3)])
    await keep(one, OTHER, *[doc(at) for at in range(50)])
    assert await one.trim("chat", 1_000, 13, 53) == 0
    assert await one.trim("chat", 1_002, 100, 1_000) == 4
    assert await one.trim("chat", 0, 7, 1_000) == 2
    assert (await names(one), await names(one, THEIRS)) == (
        ["n0004", "n0005", "n0006", "n0007", "n0008", "n0009"],
        ["n0002"],
    )
    assert await one.trim("chat", 0, 100, 12) == 4
    assert (await names(one), await names(one, THEIRS)) == (["n0008", "n0009"], ["n0002"])
    assert len(await names(one, OTHER)) == 50
    await one.close()


@on_a_loop
async def test_a_caller_that_leaves_takes_nobody_along(made: Made) -> None:
    one = made("s")
    leaving, staying = (asyncio.ensure_future(one.put(OURS, doc(at))) for at in (1, 2))
    await asyncio.sleep(0)
    leaving.cancel()
    await staying
    await one.put(OURS, doc(3))
    assert {"n0002", "n0003"} <= set(await names(one))
    await one.close()


@on_a_loop
async def test_of_those_put_at_once_by_several_one_stays(made: Made) -> None:
    several = [made("s") for _ in range(3)]
    bodies = [b"0", b"1", b"2"]
    for _ in range(10):
        puts = [
            keep(one, OURS, *(doc(at, body) for at in range(20))) for one, body in zip(several, bodies, strict=True)
        ]
        await asyncio.gather(*puts)
        found = await several[0].list(OURS, {}, None, 100)
        assert [each.name for each in found] == [doc(at).name for at in range(20)]
        assert {each.body for each in found} <= set(bodies)
        await several[1].delete(OURS, [each.name for each in found])
    for one in several:
        await one.close()


@on_a_loop
async def test_a_server_that_went_away_is_lost_and_found_again(server: Postgres, tmp_path: Path) -> None:
    one = SqlDocuments(database_url(server.create(f"doc{next(numbers)}"), tmp_path), "s", TIMEOUT_S)
    await one.put(OURS, doc(1))
    server.stop()
    try:
        for lost in (one.put(OURS, doc(2)), one.get(OURS, "n0001"), one.list(OURS, {}, None, 1)):
            with pytest.raises(RecordsLost):
                await lost
    finally:
        await asyncio.to_thread(server.start)
    await one.put(OURS, doc(3))
    assert await names(one) == ["n0001", "n0003"]
    await one.close()


@on_a_loop
async def test_what_was_deleted_is_nowhere_in_the_files(tmp_path: Path) -> None:
    one = SqlDocuments(database_url("", tmp_path / "r.sqlite"), "s", TIMEOUT_S)
    await one.put(OURS, doc(1, b"a secret" * 1000))
    assert b"a secret" in files(tmp_path)
    await one.delete(OURS, ["n0001"])
    assert b"a secret" not in files(tmp_path)
    await one.close()


@on_a_loop
async def test_tables_are_made_whole_or_not_at_all(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a router that is killed in its first second could never open its database again."""

    def broken(*_: object, **__: object) -> None:
        raise OSError("killed")

    one = made("s")
    if isinstance(one, SqlDocuments):
        with monkeypatch.context() as patched:
            patched.setattr("alembic.op.create_index", broken)
            with pytest.raises(RecordsLost, match="killed"):
                await one.put(OURS, doc(1))
        await one.close()
    many = [made("s") for _ in range(3)]
    await asyncio.gather(*(each.put(OURS, doc(at)) for at, each in enumerate(many)))
    assert await names(many[0]) == ["n0000", "n0001", "n0002"]
    for each in many:
        await each.close()


@on_a_loop
async def test_what_a_router_left_that_lives_no_more_is_whose_who_asks_first(server: Postgres, tmp_path: Path) -> None:
    for kind in ("memory", "sqlite", "postgresql"):
        gone, here, late, lives = (Shelf("background", name) for name in ("gone", "here", "late", "lives"))
        if kind == "memory":
            memory = MemoryDocuments()
            memory.gone = {"gone"}
            documents: Documents = memory
        else:
            url = database_url(server.create("adopt") if kind == "postgresql" else "", tmp_path / "a" / "r.sqlite")
            documents = SqlDocuments(url, "s", TIMEOUT_S)
            for name, for_s in (("gone", 0.0), ("here", 60.0), ("late", 60.0), ("lives", 60.0)):
                await _lives(url, "s", name, for_s)
            await _lives(url, "t", "lives", 0.0)  # another cluster's
        await keep(documents, gone, doc(1), doc(2), doc(3, b"older"))
        await keep(documents, Shelf("chat", "gone"), doc(4))
        await keep(documents, lives, doc(5))
        await keep(documents, here, doc(3, b"newer"))
        assert await documents.shelves("background") == ["gone", "here", "lives"]
        assert await documents.adopt(here) == ["n0001", "n0002"], kind
        assert await documents.adopt(late) == ["n0003"], kind
        assert await documents.adopt(here) == []
        assert await documents.shelves("background") == ["here", "late", "lives"]
        assert await names(documents, here) == ["n0001", "n0002", "n0003"]
        found = await documents.get(here, "n0003")
        assert found is not None
        assert found.body == b"newer", "what it has is not replaced"
        assert (await names(documents, Shelf("chat", "gone")), await names(documents, lives)) == (["n0004"], ["n0005"])
        await keep(documents, gone, doc(1, b"it was not gone"))
        found = await documents.get(here, "n0001")
        assert found is not None
        assert found.body == b"x"
        await documents.close()


async def _lives(url: URL, scope: str, router: str, for_s: float) -> None:
    records = sql(url, scope, router)
    await records.live(for_s)
    await records.close()
