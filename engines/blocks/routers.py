"""The routers of an engine's process, as whoever started it tells them: a file that changes when they do."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from tracehaul.runtime.files import Watched
from tracehaul.runtime.log import Log

log = Log(__name__)

ROUTERS_MAX = 256


class RoutersFile:
    """Implements :class:`tracehaul.runtime.files.Refreshed`."""

    def __init__(self, path: Path, told: Callable[[tuple[str, ...]], None]) -> None:
        self._path = path
        self._watched = Watched(path)
        self._told = told
        self._routers: tuple[str, ...] = ()

    def refresh(self) -> None:
        """Tell of the routers, if the file names others than before. One that is missing, torn or empty takes none
        away."""
        if not self._watched.changed():
            return
        try:
            routers = msgspec.json.decode(self._path.read_bytes(), type=tuple[str, ...])[:ROUTERS_MAX]
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("the routers' file cannot be read: they are those that it named", file=self._path, reason=error)
            return
        if routers and routers != self._routers:
            self._routers = routers
            log.info("routers", routers=" ".join(routers))
            self._told(routers)
