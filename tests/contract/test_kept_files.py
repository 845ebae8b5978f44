"""What keeps clients' files, whichever it is; and what a bucket alone can do wrong."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from jobs.bucket import upload as uploads
from jobs.bucket.files import ARRIVES_S, DUE
from jobs.files import File, FileLimits, Files, NoRoom, TooLong
from kvstore.tiers.objects import ObjectsRefused
from tests.contract.test_records import on_a_loop
from tests.kept_places import InBucket, InFolder, Life, in_memory, in_s3, mortal
from tests.live_batches import read
from tracehaul.runtime import clock

NOW = 1_000_000
LIMITS = FileLimits(file_bytes_max=20 << 20, tenant_bytes_max=30 << 20, files_max=3)
Place = InFolder | InBucket


@pytest.fixture(params=["folder", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    match request.param:
        case "folder":
            return InFolder(tmp_path)
        case "memory":
            return in_memory()
        case _:
            return in_s3(request.getfixturevalue("s3_url")(), tmp_path)


async def keep(files: Files, name: str, data: bytes, tenant: str = "t", expires_at: int | None = None) -> File:
    upload = await files.arriving(tenant, name, NOW)
    try:
        for start in range(0, len(data), 70_001):
            await upload.write(data[start : start + 70_001])
        file = File(name, tenant, f"{name}.jsonl", "batch", upload.size, NOW, expires_at)
        await files.keep(upload, file)
        return file
    finally:
        await upload.aclose()


@on_a_loop
async def test_a_file_is_whole_for_whoever_opens_it_next_and_gone_when_it_is_deleted(place: Place) -> None:
    contents = {"one": os.urandom(9_300_000), "two": b"", "three": b"x"}
    async with place.files(LIMITS) as files:
        made = [await keep(files, name, data) for name, data in contents.items()]
    async with place.files(LIMITS) as files:
        assert sorted(await files.list("t", NOW), key=lambda file: list(contents).index(file.id)) == made
        assert {file.id: await read(files, file) for file in made} == contents
        for start in (1, 300_000, 8_500_000, 9_300_000):
            rest = b"".join([chunk async for chunk in await files.open(made[0], start)])
            assert rest == contents["one"][start:]
        assert await files.get("other", "one", NOW) is None
        assert await files.list("other", NOW) == []
        for file in made:
            await files.delete(file)
            assert await files.get("t", file.id, NOW) is None
            with pytest.raises(FileNotFoundError):
                await files.open(file)
        assert await files.list("t", NOW) == []
    assert await place.left() == []


@on_a_loop
async def test_limits_hold_and_what_they_stop_leaves_nothing(place: Place) -> None:
    async with place.files(LIMITS) as files:
        with pytest.raises(TooLong):
            await keep(files, "long", bytes((20 << 20) + 1))
        assert await place.left() == []
        await keep(files, "a", bytes(20 << 20))
        with pytest.raises(TooLong):
            await keep(files, "b", bytes((10 << 20) + 1))
        await keep(files, "b", bytes(10 << 20))
        with pytest.raises(NoRoom):
            await keep(files, "c", b"x")
        await keep(files, "c", b"x", tenant="other")
        await files.delete((await files.list("t", NOW))[0])
        for name in ("d", "e"):
            await keep(files, name, b"x")
        with pytest.raises(NoRoom):
            await keep(files, "f", b"x")
        assert await files.erase("t") == 3
        assert [file.id for file in await files.list("other", NOW)] == ["c"]
        assert await files.erase("other") == 1
    assert await place.left() == []


@pytest.mark.parametrize("nbytes", [0, 10, 3 << 20, 18 << 20])
@on_a_loop
async def test_what_was_not_kept_is_gone(place: Place, nbytes: int) -> None:
    async with place.files(LIMITS) as files:
        upload = await files.arriving("t", "one", NOW)
        for _ in range(nbytes >> 16):
            await upload.write(bytes(1 << 16))
        await upload.aclose()
        assert await files.list("t", NOW) == []
    assert await place.left() == []


@on_a_loop
async def test_files_go_when_their_time_is_over(place: Place) -> None:
    async with place.files(LIMITS) as files:
        for name, at in {"soon": NOW + 10, "later": NOW + 20, "never": None}.items():
            await keep(files, name, name.encode(), expires_at=at)
        assert await files.get("t", "soon", NOW + 10) is None
        await files.sweep(NOW + 9)
        assert {file.id for file in await files.list("t", NOW)} == {"soon", "later", "never"}
        await files.sweep(NOW + 10)
        assert {file.id for file in await files.list("t", NOW)} == {"later", "never"}
        await files.sweep(NOW + 10**8)
        assert [file.id for file in await files.list("t", NOW)] == ["never"]
        assert await files.erase("t") == 1
    assert await place.left() == []


# --- a bucket alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True])
def test_whoever_dies_as_a_file_arrives_or_goes_leaves_nothing_for_long(after: bool) -> None:
    async def life(at: int) -> bool:
        """Whether it outlived its work."""
        place = in_memory()
        ends = Life(at, after=after)
        deleting = deleted = False
        try:
            async with mortal(place, ends).files(LIMITS) as files:
                file = await keep(files, "one", b"data", expires_at=int(clock.wall_s()) + 4000)
                deleting = True
                await files.delete(file)
                deleted = True
        except (OSError, NoRoom):
            assert ends.dead.is_set()
        async with place.files(LIMITS) as files:
            there = await files.get("t", "one", NOW)
            assert there is None or not deleted, at
            if there is not None and not deleting:
                assert await read(files, there) == b"data"
            await files.sweep(int(clock.wall_s() + 2 * ARRIVES_S))
        assert await place.left() == [], at
        return not ends.dead.is_set()

    deaths = 0
    while not asyncio.run(life(deaths)):
        deaths += 1
    assert deaths >= 7


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
@on_a_loop
async def test_a_damaged_object_is_told_and_never_whole(damage: str) -> None:
    place = in_memory()
    async with place.files(LIMITS) as files:
        file = await keep(files, "one", os.urandom(9 << 20))
        (name,) = place.objects.data
        match damage:
            case "flip":
                place.objects.data[name][5] ^= 1
            case "cut":
                del place.objects.data[name][-1:]
            case _:
                del place.objects.data[name]
        told = bytearray()

        async def tell() -> None:
            async for chunk in await files.open(file):
                told.extend(chunk)

        with pytest.raises(OSError, match=r"damaged|missing") as said:
            await tell()
        assert not isinstance(said.value, FileNotFoundError), "its row is there"
        assert len(told) < file.bytes
        await files.delete(file)
    assert await place.left() == []


@on_a_loop
async def test_a_bucket_that_is_away_refuses_or_takes_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "STALL_S", 0.2)
    monkeypatch.setattr(uploads, "GIVE_UP_S", 0.1)
    place = in_memory()
    async with place.files(LIMITS) as files:
        file = await keep(files, "one", b"data")
        place.objects.failing = True
        with pytest.raises(NoRoom, match="the bucket"):
            await keep(files, "two", bytes(12 << 20))
        with pytest.raises(OSError, match="the bucket"):
            await read(files, file)
        with pytest.raises(OSError, match="the bucket"):
            await files.delete(file)
        assert await files.get("t", "one", NOW) == file, "it can be deleted again"
        place.objects.failing = False

        async def refused(*_: object) -> None:
            raise ObjectsRefused("status code: 403")

        async def stalled(name: str, chunks: AsyncIterator[bytes]) -> None:
            await anext(chunks)
            await asyncio.sleep(3600)

        for upload, why in ((refused, "403"), (stalled, "takes nothing")):
            with monkeypatch.context() as wrong:
                wrong.setattr(place.objects, "upload", upload)
                with pytest.raises(NoRoom, match=why):
                    await keep(files, "three", bytes(12 << 20))
        assert await files.list("t", NOW) == [file]
        await files.sweep(int(clock.wall_s() + 2 * ARRIVES_S))
        await files.delete(file)
    assert await place.left() == []


@on_a_loop
async def test_a_database_that_is_away_is_told() -> None:
    place = in_memory()
    async with place.files(LIMITS) as files:
        file = await keep(files, "one", b"data")
        upload = await files.arriving("t", "two", NOW)
        await upload.write(b"more")
        place.made().lost = "it is away"  # type: ignore[attr-defined]
        for asked in (files.get("t", "one", NOW), files.list("t", NOW), files.open(file), files.delete(file)):
            with pytest.raises(OSError, match="the database"):
                await asked
        with pytest.raises(NoRoom, match="the database"):
            await files.keep(upload, File("two", "t", "two", "batch", 4, NOW))
        await upload.aclose()
        await files.sweep(NOW)
        place.made().lost = None  # type: ignore[attr-defined]
        assert await files.list("t", NOW) == [file]
        assert len(await place.made().list(DUE, {}, None, 9)) == 1
        await files.sweep(int(clock.wall_s() + 2 * ARRIVES_S))
        assert await files.list("t", NOW) == [file]
        await files.delete(file)
    assert await place.left() == []
