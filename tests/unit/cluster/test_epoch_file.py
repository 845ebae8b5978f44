"""What a router keeps of the epochs that it knows, and that no disk keeps it from serving."""

import asyncio
import errno
from pathlib import Path

import pytest

from cluster.epoch_file import EpochFile
from router.fleet.epochs import Mark
from tracehaul.runtime import kept
from tracehaul.runtime.log import Log, Seldom
from tracehaul.runtime.offload import InlineOffload
from tracehaul.wire.ids import Epoch, Generation, NodeId

N, G = NodeId("store-0"), Generation(2**53 - 1)


def test_the_next_life_of_a_router_knows_what_this_one_knew(tmp_path: Path) -> None:
    path = tmp_path / "epochs" / "router-0"

    async def life() -> list[Mark]:
        file = EpochFile(path, InlineOffload())
        found = file.epochs.marks()
        file.epochs.issue(N, Generation(G - len(found)), 7.0)
        file.changed()
        await file.close()
        return found

    assert asyncio.run(life()) == []
    assert asyncio.run(life()) == [Mark(N, Epoch(7), G)]
    assert asyncio.run(life()) == [Mark(N, Epoch(8), Generation(G - 1))]


def test_what_comes_together_is_written_once_and_what_is_not_new_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr("cluster.epoch_file.LATE_S", 0.02)
    monkeypatch.setattr("cluster.epoch_file.kept.write", lambda path, parts: written.append(path))

    async def main() -> None:
        file = EpochFile(tmp_path / "router-0", InlineOffload())
        for number in range(100):
            file.epochs.issue(NodeId(f"store-{number}"), G, 7.0)
            file.changed()
        await asyncio.sleep(0.2)
        assert len(written) == 1
        file.changed()
        await asyncio.sleep(0.2)
        await file.close()
        assert len(written) == 1
        file.epochs.issue(N, Generation(1), 7.0)
        file.changed()
        await file.close()
        assert len(written) == 2

    asyncio.run(main())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES])
def test_a_disk_that_refuses_is_told_and_costs_nothing_else(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr("cluster.epoch_file.LATE_S", 0.01)
    monkeypatch.setattr("cluster.epoch_file.kept.write", refuse)
    monkeypatch.setattr("cluster.epoch_file.seldom", Seldom(Log("cluster.epoch_file")))

    async def main() -> None:
        file = EpochFile(tmp_path / "router-0", InlineOffload())
        for life in range(3):
            file.epochs.issue(N, Generation(life), 7.0)
            file.changed()
            await asyncio.sleep(0.05)
        await file.close()
        assert file.epochs.marks() == [Mark(N, Epoch(9), Generation(2))]

    asyncio.run(main())
    assert "epochs are not kept" in caplog.text


@pytest.mark.parametrize("content", [b"[]x", b"null", b'{"a": 1}', b'[["store-0", "x", 1]]'])
def test_a_file_that_is_none_is_as_good_as_no_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "router-0"
    kept.write(path, [content])
    assert EpochFile(path, InlineOffload()).epochs.marks() == []
    path.write_bytes(content)
    assert EpochFile(path, InlineOffload()).epochs.marks() == []
