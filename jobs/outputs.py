"""A ledger that keeps lines that were answered and lines that were not, wherever. One process has it at a time.

A line is appended and kept before it counts; lines that end while others are being written go together.
"""

import asyncio
import math
from collections.abc import Collection, Container, Mapping, Sequence
from typing import NamedTuple, Protocol

from jobs.leases import Held, Leases, Taken
from jobs.results import Ended, Unasked, result

TOGETHER = 1000
"""Lines that are ended at once."""
TOGETHER_BYTES = 8 << 20


class Sink(Protocol):
    """Where lines are kept, of two kinds."""

    async def append(self, lines: Sequence[int], data: bytes, *, ok: bool) -> None:
        """These ended so, and on return are kept, whatever dies; or OSError, and none counts."""
        ...

    def size(self, *, ok: bool) -> int:
        """Bytes of that kind."""
        ...

    def close(self) -> None:
        """Let others have them."""
        ...


class _Ending(NamedTuple):
    """A line that is to be written."""

    line: int
    fence: int
    ok: bool
    said: bytes
    written: asyncio.Future[OSError | None]


class Outputs:
    """Implements :class:`jobs.ledger.Ledger`."""

    def __init__(self, ended: Mapping[int, Ended], sink: Sink, lost: Collection[int] = ()) -> None:
        """
        Args:
            ended: lines that had, and how.
            sink: keeps what ends from now on.
            lost: lines that had ended, and nobody knows how any more.
        """
        self.sink = sink
        self._leases = Leases(ended)
        self._waiting: list[_Ending] = []
        self._ending: set[int] = set()
        """Lines that are being written, and may be kept already: theirs is to end, whoever told it has gone."""
        self._writing: asyncio.Task[None] | None = None
        self._lost = set(lost)
        self.completed = sum(end.ok for end in ended.values())
        self.failed = len(ended) - self.completed
        self.unasked = sum(end.unasked for end in ended.values())
        """Those among the failed that were closed without having been asked."""

    @property
    def ended(self) -> Container[int]:
        return self._leases.ended

    async def claim(self, line: int, now_s: float, until_s: float) -> Held | Taken:
        return Taken(math.inf) if line in self._ending else self._leases.claim(line, now_s, until_s)

    async def renew(self, line: int, fence: int, until_s: float) -> bool:
        return self._leases.renew(line, fence, until_s)

    async def put_back(self, line: int, fence: int) -> bool:
        return line not in self._ending and self._leases.put_back(line, fence)

    async def end(self, line: int, fence: int, said: bytes, *, ok: bool) -> bool:
        if line in self._ending or not self._leases.renew(line, fence, math.inf):
            return False
        self._ending.add(line)
        written: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Ending(line, fence, ok, said, written))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(), name="outputs")
        if (failure := await asyncio.shield(written)) is not None:
            raise failure
        return True

    async def shut(self, batch: str, custom_ids: Mapping[str, int], why: Unasked) -> None:
        """End every line that has not ended, whoever asks it, as one that was not asked. Raises OSError."""
        left = [(line, name) for name, line in custom_ids.items() if line not in self._leases.ended]
        for start in range(0, len(left), TOGETHER):
            await asyncio.gather(*(self._shut(batch, *each, why) for each in left[start : start + TOGETHER]))

    async def _shut(self, batch: str, line: int, custom_id: str, why: Unasked) -> None:
        held = await self.claim(line, math.inf, math.inf)
        said = result(batch, custom_id, "answer_lost" if line in self._lost else why)
        if isinstance(held, Held) and await self.end(line, held.fence, said, ok=False):
            self.unasked += line not in self._lost

    def lose(self, lines: Collection[int], *, ok: bool) -> None:
        """These had ended so, and what they were answered is not there any more."""
        self._lost.update(lines)
        self._leases.ended.difference_update(lines)
        self.completed -= len(lines) if ok else 0
        self.failed -= 0 if ok else len(lines)

    async def flushed(self) -> None:
        """All that is being ended has been written, or could not be."""
        while self._writing is not None and not self._writing.done():
            await asyncio.wait((self._writing,))

    async def _write(self) -> None:
        while self._waiting:
            endings, self._waiting = self._waiting, []
            for ok in (True, False):
                mine = [ending for ending in endings if ending.ok == ok]
                while mine:
                    some = _some(mine)
                    await self._append(mine[:some], ok=ok)
                    del mine[:some]

    async def _append(self, endings: Sequence[_Ending], *, ok: bool) -> None:
        failure: OSError | None = None
        try:
            lines = [ending.line for ending in endings]
            await self.sink.append(lines, b"".join(ending.said for ending in endings), ok=ok)
        except OSError as error:
            failure = error
        for ending in endings:
            self._ending.discard(ending.line)
            if failure is None:
                ended = self._leases.end(ending.line, ending.fence)
                assert ended, "nobody else could claim it"
                self.completed += ok
                self.failed += not ok
            ending.written.set_result(failure)

    def close(self) -> None:
        """Let others have them. After :meth:`flushed`."""
        self.sink.close()


def _some(endings: Sequence[_Ending]) -> int:
    """How many of them are written at once."""
    nbytes = 0
    for count, ending in enumerate(endings):
        nbytes += len(ending.said)
        if count and nbytes > TOGETHER_BYTES:
            return count
    return len(endings)
