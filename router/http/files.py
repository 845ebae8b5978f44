"""Files that may change while we serve."""

from pathlib import Path


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
