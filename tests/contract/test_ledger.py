"""What every ledger of a batch's lines keeps to; and what files alone can do wrong."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from jobs.folder.outputs import ForeignFile, InUse, file_outputs
from jobs.leases import Held, Taken
from jobs.ledger import Ledger, MemoryLedger
from jobs.outputs import Outputs
from jobs.results import result
from jobs.retries import Answer, NoAnswer
from tracehaul.runtime.offload import ThreadOffload

INDEX = {str(line): line for line in range(8)}


def said(line: int, *, ok: bool = True) -> bytes:
    return result("b", str(line), Answer(200, b'{"a": 1.0}') if ok else NoAnswer("it went away"))


@asynccontextmanager
async def files(folder: Path, answers: str = "out", errors: str = "err") -> AsyncIterator[Outputs]:
    offload = ThreadOffload("write")
    outputs = file_outputs(folder / answers, folder / errors, INDEX, offload)
    try:
        yield outputs
    finally:
        await outputs.flushed()
        outputs.close()
        offload.close()


@asynccontextmanager
async def memory(folder: Path) -> AsyncIterator[MemoryLedger]:
    yield MemoryLedger()


@pytest.fixture(params=[memory, files])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], AsyncIterator[Ledger]]:
    return lambda: request.param(tmp_path)


def test_a_claim_is_one_s_own_until_its_time_is_over(opened) -> None:
    async def main() -> None:
        async with opened() as ledger:
            first = await ledger.claim(3, 0.0, 10.0)
            assert isinstance(first, Held)
            assert await ledger.claim(3, 9.0, 20.0) == Taken(10.0)
            assert await ledger.renew(3, first.fence, 30.0)
            assert await ledger.claim(3, 11.0, 20.0) == Taken(30.0)
            second = await ledger.claim(3, 30.0, 40.0)
            assert isinstance(second, Held)
            assert second.fence > first.fence
            assert second.lost == 1
            assert not await ledger.renew(3, first.fence, 90.0)
            assert not await ledger.put_back(3, first.fence)
            assert not await ledger.end(3, first.fence, said(3), ok=True)
            assert 3 not in ledger.ended
            assert await ledger.end(3, second.fence, said(3), ok=True)
            assert 3 in ledger.ended
            assert not await ledger.end(3, second.fence, said(3), ok=True)
            assert await ledger.claim(3, 100.0, 200.0) == Taken(None)

    asyncio.run(main())


def test_what_was_put_back_can_be_claimed_and_was_not_lost(opened) -> None:
    async def main() -> None:
        async with opened() as ledger:
            first = await ledger.claim(3, 0.0, 10.0)
            assert isinstance(first, Held)
            assert await ledger.put_back(3, first.fence)
            assert not await ledger.end(3, first.fence, said(3), ok=True)
            second = await ledger.claim(3, 1.0, 10.0)
            assert isinstance(second, Held)
            assert second.lost == 0

    asyncio.run(main())


async def end(ledger: Ledger, line: int, *, ok: bool = True) -> None:
    held = await ledger.claim(line, 0.0, 10.0)
    assert isinstance(held, Held)
    assert await ledger.end(line, held.fence, said(line, ok=ok), ok=ok)


@pytest.mark.parametrize("torn", [b"", b"{", b'{"id":"batch_req_', said(5)[:-1]])
@pytest.mark.parametrize("errors", ["err", "out"])
def test_files_are_gone_on_with(tmp_path: Path, torn: bytes, errors: str) -> None:
    async def main() -> None:
        async with files(tmp_path, errors=errors) as ledger:
            await asyncio.gather(end(ledger, 1), end(ledger, 2, ok=False), end(ledger, 3))
        with (tmp_path / "out").open("ab") as file:
            file.write(torn)
        async with files(tmp_path, errors=errors) as ledger:
            assert [line for line in range(8) if line in ledger.ended] == [1, 2, 3]
            assert (ledger.completed, ledger.failed) == (2, 1)
            await end(ledger, 5)
        lines = (tmp_path / "out").read_bytes().splitlines(keepends=True)
        assert sorted(lines) == sorted([said(1), said(3), said(5), *([said(2, ok=False)] if errors == "out" else [])])

    asyncio.run(main())


@pytest.mark.parametrize(
    "content", [b"notes\n", b"notes", b'{"custom_id": "1"}\n', b"{}\n", said(1) + b"x\n" + said(2)]
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    async def main() -> None:
        (tmp_path / "out").write_bytes(content)
        with pytest.raises(ForeignFile):
            async with files(tmp_path):
                pass
        assert (tmp_path / "out").read_bytes() == content

    asyncio.run(main())


def test_results_of_another_batch_are_left_as_they_are(tmp_path: Path) -> None:
    async def main() -> None:
        content = result("c", "other", NoAnswer("x"))
        (tmp_path / "out").write_bytes(content)
        with pytest.raises(ForeignFile, match="other"):
            async with files(tmp_path):
                pass
        assert (tmp_path / "out").read_bytes() == content

    asyncio.run(main())


def test_one_process_has_the_files_at_a_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with files(tmp_path):
            with pytest.raises(InUse):
                async with files(tmp_path):
                    pass
        async with files(tmp_path):
            pass

    asyncio.run(main())


def test_a_disk_that_is_lost_in_mid_line_is_cleaned_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with files(tmp_path) as ledger:
            await end(ledger, 1)
            held = await ledger.claim(2, 0.0, 10.0)
            assert isinstance(held, Held)

            def refuse(*_: object) -> None:
                raise OSError(5, "Input/output error")

            with monkeypatch.context() as lost:
                lost.setattr(os, "fsync", refuse)
                lost.setattr(os, "ftruncate", refuse)
                with pytest.raises(OSError, match="Input/output"):
                    await ledger.end(2, held.fence, said(2), ok=True)
            assert await ledger.end(2, held.fence, said(2), ok=True)
        assert (tmp_path / "out").read_bytes() == said(1) + said(2)

    asyncio.run(main())


def test_a_full_disk_keeps_nothing_half_and_the_line_can_be_ended_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with files(tmp_path) as ledger:
            await end(ledger, 1)
            write = os.write
            held = await ledger.claim(2, 0.0, 10.0)
            assert isinstance(held, Held)

            def half(handle: int, data: bytes) -> int:
                if len(data) > 8:
                    return write(handle, data[:8])
                raise OSError(28, "No space left on device")

            with monkeypatch.context() as full:
                full.setattr(os, "write", half)
                with pytest.raises(OSError, match="No space"):
                    await ledger.end(2, held.fence, said(2)[:16], ok=True)
            assert (tmp_path / "out").read_bytes() == said(1)
            assert 2 not in ledger.ended
            assert await ledger.end(2, held.fence, said(2), ok=True)
        assert (tmp_path / "out").read_bytes() == said(1) + said(2)

    asyncio.run(main())


def test_an_end_whose_teller_was_cancelled_is_kept_or_not_but_never_twice(tmp_path: Path) -> None:
    async def main() -> None:
        async with files(tmp_path) as ledger:
            held = await ledger.claim(2, 0.0, 10.0)
            assert isinstance(held, Held)
            telling = asyncio.create_task(ledger.end(2, held.fence, said(2), ok=True))
            await asyncio.sleep(0)
            telling.cancel()
            await asyncio.wait((telling,))
            assert not await ledger.put_back(2, held.fence), "it may be on the disk already"
            assert isinstance(await ledger.claim(2, float("inf"), float("inf")), Taken)
            await ledger.flushed()
            assert 2 in ledger.ended
            assert await ledger.claim(2, float("inf"), float("inf")) == Taken(None)
        assert (tmp_path / "out").read_bytes() == said(2)

    asyncio.run(main())
