"""The epochs that a router knows of, in a small file: so that its next life fences whom this one would.

Without it a router learns them from the nodes that join it again, so a disk that refuses costs little, and no node.
"""

import asyncio
from pathlib import Path

import msgspec

from router.fleet.epochs import Epochs, Mark
from tracehaul.runtime import kept
from tracehaul.runtime.log import Log, Seldom
from tracehaul.runtime.offload import Offload

LATE_S = 0.2
"""What is new is written together, at most so long after it came, and a write."""

log = Log(__name__)
seldom = Seldom(log)


class EpochFile:
    """Keeps :attr:`epochs` in ``path``: call :meth:`changed` after each change. Used within one event loop."""

    def __init__(self, path: Path, offload: Offload) -> None:
        self._path = path
        self._offload = offload
        self._written: bytes = b""
        self._writing: asyncio.Task[None] | None = None
        self._new = False
        self.epochs = Epochs(self._read())

    def changed(self) -> None:
        """There may be something new to be kept."""
        self._new = True
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write(), name="epochs")

    async def close(self) -> None:
        """The file is complete, where it can be."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait([self._writing])
        await self._put()

    async def _write(self) -> None:
        while self._new:
            await asyncio.sleep(LATE_S)
            await self._put()
        self._writing = None

    async def _put(self) -> None:
        self._new = False
        content = msgspec.json.encode(self.epochs.marks())
        if content == self._written:
            return
        try:
            await self._offload.run(lambda: self._replace(content))
            self._written = content
        except OSError as error:
            seldom.warning("epochs are not kept: a restart of this router learns them from the nodes", why=error)

    def _replace(self, content: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept.write(self._path, [content])

    def _read(self) -> list[Mark]:
        content = kept.read(self._path)
        if content is None:
            return []
        try:
            return msgspec.json.decode(content, type=list[Mark])
        except msgspec.DecodeError as error:
            log.warning("the epochs that were kept cannot be read", file=self._path, why=error)
            return []
