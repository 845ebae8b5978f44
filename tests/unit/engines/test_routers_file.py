"""Whoever started a server tells its plugin of the routers by a file."""

from pathlib import Path

import pytest

from cluster.engines import write_routers
from engines.blocks.routers import ROUTERS_MAX, RoutersFile


class Told:
    def __init__(self, file: Path) -> None:
        self.told: list[tuple[str, ...]] = []
        self.file = RoutersFile(file, self.told.append)


def test_each_change_is_told_once(tmp_path: Path) -> None:
    file = tmp_path / "routers.json"
    told = Told(file)
    told.file.refresh()
    assert told.told == [], "a file that is not there yet says nothing"
    write_routers(file, ("a:1",))
    told.file.refresh()
    told.file.refresh()
    write_routers(file, ("a:1", "b:2"))
    told.file.refresh()
    write_routers(file, ("a:1", "b:2"))  # written again, and the same
    told.file.refresh()
    assert told.told == [("a:1",), ("a:1", "b:2")]
    assert [path.name for path in tmp_path.iterdir()] == ["routers.json"]


@pytest.mark.parametrize("wrong", [b"", b"[", b"{}", b"[1]", b"[]", b"\xff"])
def test_what_names_nobody_takes_none_away(tmp_path: Path, wrong: bytes) -> None:
    file = tmp_path / "routers.json"
    told = Told(file)
    write_routers(file, ("a:1",))
    told.file.refresh()
    file.write_bytes(wrong)
    told.file.refresh()
    file.unlink()
    told.file.refresh()
    assert told.told == [("a:1",)]


def test_no_file_names_more_than_anybody_has(tmp_path: Path) -> None:
    file = tmp_path / "routers.json"
    told = Told(file)
    write_routers(file, tuple(f"h:{port}" for port in range(10 * ROUTERS_MAX)))
    told.file.refresh()
    assert len(told.told[0]) == ROUTERS_MAX


def test_a_folder_that_cannot_be_written_to_ends_nobody(tmp_path: Path) -> None:
    write_routers(tmp_path / "gone" / "routers.json", ("a:1",))
