"""The file of what traces were answered: nothing that happens to it costs more than what it held."""

import asyncio
import errno
import os
from pathlib import Path

import pytest

from cluster import answer_file
from cluster.answer_file import AnswerFile, opened_answers
from router.dispatch.config import DispatchConfig
from router.traces.texts import Said, fresh
from router.traces.turns import KEY_BYTES, Turn, packed_turns
from tracehaul.wire.hashing import pack_tokens
from tracehaul.wire.ids import TraceId

CONTEXT = b"c" * KEY_BYTES
BYTES = 500
"""Of an answer."""
RECORD_BYTES = 1200
"""Of a whole record: the answer is in its name once more."""
ROUND = 2
"""Answers that are written at once: by so many a limit may be passed."""


def key(name: str, salt: str = "") -> tuple[str, TraceId]:
    return salt, TraceId(name)


def said(answer: str, *, number: int = 1) -> Said:
    prompt = fresh("prompt", [1, 2, 3])
    turns = [Turn(bytes([at]) * KEY_BYTES) for at in range(number)]
    last = Turn(b"s" * KEY_BYTES, b"t" * KEY_BYTES, len(prompt.text) + len(answer))
    return Said(prompt, answer, pack_tokens(range(9)), packed_turns(CONTEXT, [*turns, last]), "model")


async def answers_of(path: Path, *names: str, **limits: int) -> list[list[str]]:
    async with opened_answers(path, DispatchConfig(**limits)) as file:
        return [[kept.answer for kept in await file.read(key(name))] for name in names]


async def fill(path: Path, *answers: tuple[str, str], **limits: int) -> None:
    async with opened_answers(path, DispatchConfig(**limits)) as file:
        for name, answer in answers:
            file.keep(key(name), said(answer), f"heard-{answer}")


def test_what_is_kept_comes_back_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "answers"

    async def main() -> None:
        await fill(path, ("a", "1"), ("b", "2"), ("a", "3"))
        await fill(path, ("a", "4"))
        assert await answers_of(path, "a", "b", "c") == [["1", "3", "4"], ["2"], []]
        async with opened_answers(path, DispatchConfig()) as file:
            [kept] = await file.read(key("b"))
            assert (kept.number, kept.context, kept.generated) == (1, CONTEXT, pack_tokens(range(9)))
            assert (file.heard("", "heard-2"), file.heard("x", "heard-2"), file.heard("", "?")) == ("b", None, None)
            assert file.known(key("a"), former=True)
            file.placed(key("a"), all_of_them=True)
            assert not file.known(key("a"), former=True)
            assert file.known(key("a"), former=False)
            for _ in range(answer_file.CALLS_MAX):
                assert file.known(key("b"), former=True)
                file.placed(key("b"), all_of_them=False)
            assert not file.known(key("b"), former=True)

    asyncio.run(main())
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_answer_is_in_the_file_soon_though_none_follows(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_answers(tmp_path / "a", DispatchConfig()) as file:
            file.keep(key("a"), said("an answer"), None)
            while b"an answer" not in (tmp_path / "a").read_bytes():  # noqa: ASYNC110 - a file tells nobody
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_torn_end_is_cut_off_wherever_it_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "a"

    async def main() -> None:
        await fill(path, ("a", "1"))
        whole = path.stat().st_size
        await fill(path, ("a", "2"))
        data = path.read_bytes()
        for size in (*range(whole, whole + 30), len(data) - 1):
            path.write_bytes(data[:size])
            await fill(path, ("a", "3"))
            assert await answers_of(path, "a") == [["1", "3"]]
        path.write_bytes(data[:-1] + b"?")
        assert await answers_of(path, "a") == [["1"]]
        path.write_bytes(data[:7])
        await fill(path, ("a", "4"))
        assert await answers_of(path, "a") == [["4"]]

    asyncio.run(main())
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("at", [0, 40, 100], ids=["begin", "first", "answer"])
def test_a_damaged_file_is_put_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, at: int) -> None:
    path = tmp_path / "a"

    async def main() -> None:
        await fill(path, ("a", "1" * 100), ("a", "2"))
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
        assert await answers_of(path, "a") == [[]]
        assert (tmp_path / "a.damaged").read_bytes() == data
        await fill(path, ("a", "3"))
        assert await answers_of(path, "a") == [["3"]]

    asyncio.run(main())
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "the answers that were kept cannot be read: the file was put aside"
    ]


def test_a_full_disk_is_told_once_and_costs_what_did_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a"
    pwrite = os.pwrite

    def full(fd: int, data: bytes, at: int) -> int:
        pwrite(fd, data[:20], at)
        raise OSError(errno.ENOSPC, "no space left on device")

    async def main() -> None:
        monkeypatch.setattr(answer_file, "LATE_S", 0.0)
        async with opened_answers(path, DispatchConfig()) as file:
            assert isinstance(file, AnswerFile)
            for write, answer in ((pwrite, "1"), (full, "2" * 99), (full, "3"), (pwrite, "4")):
                monkeypatch.setattr(os, "pwrite", write)
                file.keep(key("a"), said(answer), None)
                await asyncio.sleep(0.001)
                await file.dropped()
            assert [kept.answer for kept in await file.read(key("a"))] == ["1", "4"]
        assert await answers_of(path, "a") == [["1", "4"]]

    asyncio.run(main())
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def test_where_no_file_can_be_nothing_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "no folder").touch()

    async def main() -> None:
        await fill(tmp_path / "no folder" / "a", ("a", "1"))

    asyncio.run(main())
    assert len(caplog.records) == 1


def test_without_a_limit_nothing_is_kept_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a"

    async def main() -> None:
        await fill(path, ("a", "1"))
        assert path.exists()
        await fill(path, ("a", "2"), answers_bytes_max=0)
        assert not path.exists()

    asyncio.run(main())


@pytest.mark.parametrize("limits", [{"answers_bytes_max": 40 * BYTES}, {"answers_max": 40}], ids=["bytes", "answers"])
def test_the_traces_that_rested_longest_go(tmp_path: Path, limits: dict[str, int]) -> None:
    path = tmp_path / "a"

    async def main() -> None:
        await fill(path, ("old", "first"), **limits)
        for at in range(100):
            used = [("used", str(at))] if at % 10 == 0 else []
            await fill(path, *used, (f"t{at}", "?" * BYTES), **limits)
            names = ["used", "old", *(f"t{one}" for one in range(at + 1))]
            assert sum(map(len, await answers_of(path, *names, **limits))) <= limits.get("answers_max", 100) + ROUND
            assert path.stat().st_size <= limits.get("answers_bytes_max", 100_000) + ROUND * RECORD_BYTES
        used, old, last, before = await answers_of(path, "used", "old", "t99", "t10", **limits)
        assert old == before == []
        assert last == ["?" * BYTES]
        assert used == [str(at) for at in range(0, 100, 10)], "whole, though it began early"

    asyncio.run(main())


def test_what_is_dropped_is_gone_at_once_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"

    async def main() -> None:
        await fill(path, ("a", "secret one"), ("b", "kept"), ("a", "secret two"))
        async with opened_answers(path, DispatchConfig()) as file:
            file.keep(key("a"), said("secret three"), "heard-3")
            assert file.drop(key("a"))
            assert not file.drop(key("a"))
            assert file.heard("", "heard-3") is None
            assert await file.read(key("a")) == []
            file.keep(key("a"), said("again"), None)
            await file.dropped()
            assert b"secret" not in path.read_bytes()
        assert await answers_of(path, "a", "b") == [["again"], ["kept"]]

    asyncio.run(main())


def test_what_is_dropped_while_the_file_is_written_anew_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "a"

    async def main() -> None:
        limit = 40 * BYTES
        async with opened_answers(path, DispatchConfig(answers_bytes_max=limit)) as file:
            assert isinstance(file, AnswerFile)
            for at in range(300):
                file.keep(key(f"t{at}"), said(f"secret {at} " + "?" * BYTES), None)
                if at % 7 == 0:
                    file.drop(key(f"t{max(0, at - 20)}"))
                if at % 3 == 0:
                    await asyncio.sleep(0)
            await file.dropped()
            for at in range(300):
                file.drop(key(f"t{at}"))
            await file.dropped()
            assert b"secret" not in path.read_bytes()
        assert await answers_of(path, "t299") == [[]]

    asyncio.run(main())
