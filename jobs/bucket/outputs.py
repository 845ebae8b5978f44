"""A batch's lines in a bucket: put together as they end, read again by whoever goes on, told once each."""

import asyncio
import errno
from array import array
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial

from jobs.bucket.objects import DAMAGED, Objects, told
from jobs.bucket.segments import Segment
from jobs.results import Ended, ended_by
from kvstore.tiers.objects import DELETE_MAX
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import Offload

log = Log(__name__)

TRIES = 3
"""So often a segment is read before it is believed to be damaged."""
AT_ONCE = 4
"""So many are read beside each other."""
MOVED_BYTES = 4 << 20
"""Lines that were another owner's are put together up to so many."""
MISSING = "it is missing from the bucket"
JOINED = 64
"""Segments of one kind become one when there are so many."""
JOINED_BYTES = 1 << 20
"""Larger ones, together, stay as they are."""


class DamagedSegment(OSError):
    """These lines are not there any more."""

    def __init__(self, segment: Segment, lines: Sequence[int], why: str) -> None:
        super().__init__(errno.EIO, f"lines of a batch are lost, {segment.name}: {why}")
        self.segment = segment
        self.lines = lines


class Segments:
    """Implements :class:`jobs.outputs.Sink`: one owner's of one batch."""

    def __init__(self, objects: Objects, folder: str, epoch: int, index: Mapping[str, int], checking: Offload) -> None:
        """
        Args:
            objects: of the bucket.
            folder: where the batch's are in it.
            epoch: the owner's, above all before it.
            index: the batch's lines by their ``custom_id``.
            checking: where lines are read; the caller closes it.
        """
        self._objects = objects
        self._folder = folder
        self._epoch = epoch
        self._index = index
        self._checking = checking
        self._known: list[Segment] = []
        self._of = array("l", [-1]) * (max(index.values(), default=-1) + 1)
        """Of each line that ended the place of its segment in the list."""
        self._numbers = 0
        self._tails: dict[bool, list[tuple[int, Sequence[int], bytes]]] = {True: [], False: []}
        """Of the last segments of each kind place, lines and bytes, until they become one."""

    @property
    def names(self) -> list[str]:
        """Of the segments that count."""
        counting = set(self._of)
        return [segment.name for at, segment in enumerate(self._known) if at in counting]

    def size(self, *, ok: bool) -> int:
        return sum(segment.nbytes for segment in map(Segment.named, self.names) if segment and segment.ok == ok)

    def close(self) -> None:
        pass

    # --- what was there ---------------------------------------------------------------------------------------

    async def recover(self) -> dict[int, Ended]:
        """All lines that have ended, and how each did: they are in segments of this owner from now on, so that nobody
        who had the batch before can take them away. What is damaged is left out, told in the log. Raises OSError."""
        with told():
            pages = [page async for page in self._objects.pages(self._folder)]
        names = [listed.name.rpartition("/")[2] for page in pages for listed in page]
        found = sorted((each for name in names if (each := Segment.named(name)) is not None), reverse=True)
        self._numbers = max((each.number for each in found if each.epoch == self._epoch), default=0)
        ended: dict[int, Ended] = {}
        moved: dict[bool, tuple[list[int], list[bytes]]] = {True: ([], []), False: ([], [])}
        old: list[str] = []
        async for segment, data in self._several(found):
            if isinstance(data, str):
                if data == MISSING:  # whoever had it put it together with others meanwhile
                    raise OSError(errno.EIO, "a batch's lines are being moved")
                log.error("lines of a batch are lost", segment=f"{self._folder}/{segment.name}", why=data)
                continue
            old.append(f"{self._folder}/{segment.name}")
            lines, parts = moved[segment.ok]
            for line, (end, said) in (await self._checking.run(partial(self._lines, data))).items():
                if line not in ended:
                    ended[line] = end
                    lines.append(line)
                    parts.append(said)
            if sum(map(len, parts)) > MOVED_BYTES:
                await self._move(moved[segment.ok], ok=segment.ok)
        for ok in (True, False):
            await self._move(moved[ok], ok=ok)
        with told():
            for start in range(0, len(old), DELETE_MAX):
                await self._objects.delete(old[start : start + DELETE_MAX])
        return ended

    async def _move(self, kept: tuple[list[int], list[bytes]], *, ok: bool) -> None:
        if kept[0]:
            await self._put(kept[0], b"".join(kept[1]), ok=ok)
            kept[0].clear()
            kept[1].clear()

    async def settled(self, names: Sequence[str]) -> dict[int, Ended]:
        """As :meth:`recover`, of a batch whose segments are said: they stay as they are. Raises OSError."""
        ended: dict[int, Ended] = {}
        found = sorted(each for name in names if (each := Segment.named(name)) is not None)
        async for segment, data in self._several(found):
            if isinstance(data, str):
                log.error("lines of a batch are lost", segment=f"{self._folder}/{segment.name}", why=data)
                continue
            self._known.append(segment)
            for line, (end, _) in (await self._checking.run(partial(self._lines, data))).items():
                ended[line] = end
                self._of[line] = len(self._known) - 1
        self._numbers = max((each.number for each in found if each.epoch == self._epoch), default=0)
        return ended

    async def _several(self, segments: Sequence[Segment]) -> AsyncGenerator[tuple[Segment, bytes | str]]:
        for start in range(0, len(segments), AT_ONCE):
            some = segments[start : start + AT_ONCE]
            for segment, data in zip(some, await asyncio.gather(*map(self._read, some)), strict=True):
                yield segment, data

    async def _read(self, segment: Segment) -> bytes | str:
        """Its lines, or what is wrong with it. Raises OSError: nobody knows."""
        why = DAMAGED
        for _ in range(TRIES):
            try:
                with told():
                    data = await self._objects.read(f"{self._folder}/{segment.name}", 0, segment.nbytes + 1)
                if segment.has(data):
                    return data
                why = DAMAGED
            except FileNotFoundError:
                why = MISSING
        return why

    def _lines(self, data: bytes) -> dict[int, tuple[Ended, bytes]]:
        """By their places in the batch, of those that are in it."""
        found = [(ended_by(line), line) for line in data.splitlines(keepends=True)]
        index = self._index
        return {index[end.custom_id]: (end, line) for end, line in found if end is not None and end.custom_id in index}

    # --- what ends --------------------------------------------------------------------------------------------

    async def append(self, lines: Sequence[int], data: bytes, *, ok: bool) -> None:
        at = await self._put(lines, data, ok=ok)
        tail = self._tails[ok]
        tail.append((at, lines, data))
        if sum(len(data) for _, _, data in tail) > JOINED_BYTES:
            tail.clear()
        elif len(tail) >= JOINED:
            await self._join(ok=ok)

    async def _put(self, lines: Sequence[int], data: bytes, *, ok: bool) -> int:
        self._numbers += 1
        segment = Segment.of(self._epoch, self._numbers, data, ok=ok)
        with told():
            await self._objects.put(f"{self._folder}/{segment.name}", memoryview(data))
        self._known.append(segment)
        for line in lines:
            self._of[line] = len(self._known) - 1
        return len(self._known) - 1

    async def _join(self, *, ok: bool) -> None:
        """The last ones are one from now on; whatever goes wrong, each line is in one that is there."""
        tail, self._tails[ok] = self._tails[ok], []
        lines = [line for _, some, _ in tail for line in some]
        try:
            await self._put(lines, b"".join(data for _, _, data in tail), ok=ok)
            with told():
                await self._objects.delete([f"{self._folder}/{self._known[at].name}" for at, _, _ in tail])
        except OSError as error:
            log.debug("segments of a batch stay apart", folder=self._folder, why=error)

    # --- what is delivered ------------------------------------------------------------------------------------

    async def delivered(self, *, ok: bool) -> AsyncGenerator[bytes]:
        """Every line that ended so, once, some at a time.

        Raises:
            DamagedSegment: some are not there any more.
            OSError: they cannot be read now.
        """
        counting = set(self._of)
        for at, segment in enumerate(self._known):
            if segment.ok != ok or at not in counting:
                continue
            data = await self._read(segment)
            if isinstance(data, str):
                raise DamagedSegment(segment, [line for line, place in enumerate(self._of) if place == at], data)
            yield data

    def lose(self, lines: Sequence[int]) -> None:
        """They are in no segment."""
        for line in lines:
            self._of[line] = -1
