"""Files and batches of a process that is gone: whoever goes on with them has all of them, whenever that ends."""

import asyncio
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs.batch import Batch
from jobs.batches import Batches
from jobs.files import File, FileLimits
from jobs.folder.files import FolderFiles
from jobs.folder.left import BATCHES, FILES, holds, locked, others
from tests.unit.jobs.test_batches import DEAD, LINES, NOW, WRONG, Dying, calls, live, new, over, told
from tracehaul.runtime.offload import InlineOffload

LATER = "later"
"""The router that goes on."""


async def begun(batches: Batches, files: FolderFiles) -> None:
    """A file of no batch, and a batch that has just begun."""
    for name in ("file-in", "file-other"):
        upload = await files.arriving("t", name, NOW)
        await upload.write(calls())
        await files.keep(upload, File(name, "t", name, "batch", upload.size, NOW))
        upload.close()
    file = await files.get("t", "file-in", NOW)
    assert file is not None
    await batches.create(new(), file)


def died(folder: Path, at: int) -> None:
    """A process with that folder ends in the middle of its batch."""
    child = os.fork()
    if child == 0:
        try:
            asyncio.run(live(folder, Dying(at, after=True), _all))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == DEAD


async def _all(batches: Batches, files: FolderFiles) -> Batch:
    await begun(batches, files)
    return await over(batches)


async def taken(batches: Batches, files: FolderFiles, gone: Path) -> Batch:
    with locked(gone) as mine:
        assert mine
        await files.adopt(gone / FILES)
        batches.took(await batches.store.adopt(gone / BATCHES))
    return await over(batches)


@pytest.mark.parametrize("at", [12, 14, 17, 20])
def test_a_batch_goes_on_at_another_and_each_line_ends_once(tmp_path: Path, at: int) -> None:
    gone, here = tmp_path / "gone", tmp_path / LATER
    died(gone, at)
    assert others(here) == [gone]
    batch = asyncio.run(live(here, InlineOffload(), partial(taken, gone=gone)))
    assert batch.status == "completed"
    found = told(here, batch)
    assert found == {f"c{line}{'-' if f'c{line}' == WRONG else '+'}": 1 for line in range(LINES)}
    assert not holds(gone)
    assert others(here) == []
    files = FolderFiles(here / FILES, FileLimits(), InlineOffload())
    assert {file.id for file in asyncio.run(files.list("t", NOW))} >= {"file-in", "file-other"}
    files.close()


def test_who_dies_as_it_takes_them_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any of its steps; then who comes after it goes on."""
    deaths = 0
    while True:
        gone, here = tmp_path / f"{deaths}" / "gone", tmp_path / f"{deaths}" / LATER
        died(gone, 14)
        use = partial(taken, gone=gone)
        child = os.fork()
        if child == 0:
            left = [deaths]
            for owner, name in ((os, "link"), (Path, "rename"), (Path, "unlink")):
                monkeypatch.setattr(owner, name, _dying(getattr(owner, name), left))
            try:
                asyncio.run(live(here, InlineOffload(), use))
            finally:
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        batch = asyncio.run(live(here, InlineOffload(), use))
        assert batch.status == "completed", deaths
        assert sum(told(here, batch).values()) == LINES, deaths
        files = FolderFiles(here / FILES, FileLimits(), InlineOffload())
        kept = {file.id: files.path(file).read_bytes() for file in asyncio.run(files.list("t", NOW))}
        assert kept["file-in"] == kept["file-other"] == calls(), deaths
        files.close()
        if code == 0:
            break
        deaths += 1
    assert deaths > 8, "it has more of them than that"


def _dying(real: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            os._exit(DEAD)
        return real(*args, **kwargs)

    return call


def test_who_lives_has_its_own(tmp_path: Path) -> None:
    files = FolderFiles(tmp_path / "lives" / FILES, FileLimits(), InlineOffload())
    with locked(tmp_path / "lives") as mine:
        assert not mine
    files.close()
    with locked(tmp_path / "lives") as mine:
        assert mine
        with pytest.raises(BlockingIOError):
            FolderFiles(tmp_path / "lives" / FILES, FileLimits(), InlineOffload())
    FolderFiles(tmp_path / "lives" / FILES, FileLimits(), InlineOffload()).close()


def test_a_folder_that_was_one_routers_alone_is_found_too(tmp_path: Path) -> None:
    died(tmp_path, 14)
    here = tmp_path / "router-0"
    here.mkdir()
    assert others(here) == [tmp_path]
