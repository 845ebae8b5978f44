"""The directory that needs nothing: the plan beside which a node runs, read again when it changes."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from cluster.directory.base import Told
from cluster.rundir import ClusterFault
from tracehaul.runtime.files import EVERY_S, Watched
from tracehaul.runtime.log import Log

log = Log(__name__)


class FileDirectory:
    """Implements :class:`cluster.directory.base.Directory`."""

    def __init__(self, path: Path, read: Callable[[], tuple[str, ...]], every_s: float = EVERY_S) -> None:
        """``read``: the routers of the plan in ``path``; it may raise ClusterFault.

        Raises:
            ClusterFault: as ``read`` does.
        """
        self._watched = Watched(path)
        self._watched.changed()
        self._read = read
        self._every_s = every_s
        self._routers = tuple(sorted(read()))
        self._fault = ""

    @property
    def routers(self) -> tuple[str, ...]:
        return self._routers

    @property
    def fault(self) -> str:
        return self._fault

    async def follow(self, told: Told) -> NoReturn:
        told(self._routers)
        while True:
            await asyncio.sleep(self._every_s)
            if self._watched.changed() and self._changed():
                told(self._routers)

    def _changed(self) -> bool:
        try:
            routers = tuple(sorted(self._read()))
        except ClusterFault as fault:
            self._fault = str(fault)
            log.warning("the plan cannot be read: the routers are those that it named", reason=fault)
            return False
        if not routers:
            self._fault = "the plan names no router"
            log.warning("the plan names no router: they are those that it named")
            return False
        self._fault = ""
        changed, self._routers = routers != self._routers, routers
        return changed

    async def announce(self, name: str, address: str) -> NoReturn:
        while True:  # whoever wrote the plan has said where it is
            await asyncio.Event().wait()
