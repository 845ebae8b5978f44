"""Files that may change while we serve."""

import asyncio
from pathlib import Path
from typing import Protocol

EVERY_S = 1.0


class Refreshed(Protocol):
    """Comes of files."""

    def refresh(self) -> None:
        """Follow them, if they have changed."""
        ...


async def refreshing(*parts: Refreshed, every_s: float = EVERY_S) -> None:
    """Has these follow their files, for as long as it runs."""
    while True:
        await asyncio.sleep(every_s)
        for part in parts:
            part.refresh()


class Watched:
    """Some files, and whether they are still those that were read."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._stamps: list[tuple[int, int, int] | None] = []

    def changed(self) -> bool:
        """Whether any was replaced or written since this was asked last; True the first time."""
        stamps = [_stamp(path) for path in self._paths]
        changed, self._stamps = stamps != self._stamps, stamps
        return changed


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
