"""The answers that traces were given, in one file beside the router's logs: what a restart must not forget.

The file grows at its end. What is dropped is overwritten where it stands; where there is too much, the file is written
anew without the traces whose last answer is the oldest. A disk that refuses costs what was to be kept, and no call.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec

from cluster.answer_bytes import AnswerBytes, Damaged, New, Row
from router.dispatch.config import DispatchConfig
from router.traces.kept import Answers, Kept, NoAnswers, Whose
from router.traces.texts import Said
from router.traces.trace import RESPONSES_MAX, TraceKey
from tracehaul.runtime.clock import perf_s
from tracehaul.runtime.log import Log
from tracehaul.runtime.offload import Offload, ThreadOffload
from tracehaul.wire.ids import TraceId

log = Log(__name__)

LATE_S = 0.5
"""Answers are written together, at most so long after they were given."""
WAITING_MAX = 4096
"""Answers that wait for the disk; more are not kept."""
ROOM = 0.75
"""Of the limits: so much stays where the file is written anew."""
RETRY_S = 60.0
"""After the disk refused to take the file anew."""
CALLS_MAX = 8
"""Calls of a trace for which answers of a former life are looked through: those of branches that were left are never
told."""

_NOT_KEPT = "answers are not kept: a restart of the router will not know of them"


class _Trace(msgspec.Struct, gc=False):
    """What is kept of one."""

    rows: list[Row]
    heard: list[str]
    calls_left: int = 0
    """For which its rows may be looked through though it has texts."""


class AnswerFile:
    """Implements :class:`router.traces.kept.Answers` with a file; :func:`opened_answers` makes one."""

    def __init__(
        self, file: AnswerBytes, found: Sequence[tuple[Whose, Row]], offload: Offload, bytes_max: int, answers_max: int
    ) -> None:
        self._file = file
        self._offload = offload
        self._bytes_max = bytes_max
        self._answers_max = answers_max
        self._traces: OrderedDict[TraceKey, _Trace] = OrderedDict()
        """The one that was given an answer last is the last."""
        self._heard: dict[str, TraceKey] = {}
        self._most = 0
        """Of them since the table was made."""
        self._count = 0
        self._new: list[New] = []
        self._gone: list[Row] = []
        self._lock = asyncio.Lock()
        """Of the file."""
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Task[None] | None = None
        self._retry_s = 0.0
        self._refused = False
        for whose, row in found:
            self._add(whose.key, row, whose.heard).calls_left = CALLS_MAX

    def keep(self, key: TraceKey, said: Said, heard: str | None) -> None:
        if len(self._new) >= WAITING_MAX:
            self._refuses("too many answers wait")
            return
        row = Row()
        self._add(key, row, heard or "")
        self._new.append(New(row, key, said, heard))
        if self._timer is None and self._writing is None:
            self._timer = asyncio.get_running_loop().call_later(LATE_S, self._begin)

    def known(self, key: TraceKey, *, former: bool) -> bool:
        trace = self._traces.get(key)
        return trace is not None and (not former or trace.calls_left > 0)

    def heard(self, salt: str, name: str) -> TraceId | None:
        key = self._heard.get(name)
        return key[1] if key is not None and key[0] == salt else None

    async def read(self, key: TraceKey) -> list[Kept]:
        async with self._lock:
            trace = self._traces.get(key)
            if trace is None:
                return []
            try:
                return await self._offload.run(partial(self._file.read, list(trace.rows)))
            except (OSError, msgspec.DecodeError) as error:
                self._refuses(error)
                return []

    def placed(self, key: TraceKey, *, all_of_them: bool) -> None:
        trace = self._traces.get(key)
        if trace is not None:
            trace.calls_left = 0 if all_of_them else max(0, trace.calls_left - 1)

    def drop(self, key: TraceKey) -> bool:
        if key not in self._traces:
            return False
        rows = self._forget(key)
        for row in rows:
            row.gone = True
        self._gone += rows
        self._begin()
        return True

    def drop_all(self, salt: str) -> None:
        for key in [key for key in self._traces if key[0] == salt]:
            self.drop(key)

    async def dropped(self) -> None:
        while self._writing is not None:
            await asyncio.wait([self._writing])

    async def aclose(self) -> None:
        """Write what waits, and give up the file."""
        self._begin()
        await self.dropped()
        self._file.close()

    def _add(self, key: TraceKey, row: Row, heard: str) -> _Trace:
        trace = self._traces.get(key)
        if trace is None:
            trace = self._traces[key] = _Trace([], [])
        self._traces.move_to_end(key)
        trace.rows.append(row)
        self._count += 1
        if heard:
            self._heard[heard] = key
            trace.heard.append(heard)
            if len(trace.heard) > RESPONSES_MAX:
                self._unheard(key, trace.heard.pop(0))
        return trace

    def _unheard(self, key: TraceKey, heard: str) -> None:
        if self._heard.get(heard) == key:
            del self._heard[heard]

    def _forget(self, key: TraceKey) -> list[Row]:
        """Know nothing of a trace; returns its rows."""
        trace = self._traces.pop(key)
        self._most = max(self._most, len(self._heard))
        for heard in trace.heard:
            self._unheard(key, heard)
        self._count -= len(trace.rows)
        if len(self._heard) < self._most // 4:  # a table never shrinks by itself
            self._traces, self._heard, self._most = OrderedDict(self._traces), dict(self._heard), len(self._heard)
        return trace.rows

    def _begin(self) -> None:
        """Write what waits, now."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writing is None and (self._new or self._gone):
            self._writing = asyncio.get_running_loop().create_task(self._write(), name="answers")

    async def _write(self) -> None:
        """One round, and another one where what was dropped meanwhile is still there."""
        try:
            while True:
                new, self._new = self._new, []
                gone, self._gone = self._gone, []
                await self._round(new, gone)
                if not self._gone:
                    break
        finally:
            self._writing = None
            if self._new:
                self._timer = asyncio.get_running_loop().call_later(LATE_S, self._begin)

    async def _round(self, new: Sequence[New], gone: Sequence[Row]) -> None:
        async with self._lock:
            try:
                await self._offload.run(partial(self._file.drop, gone))
                full = self._file.size > self._bytes_max or self._count > self._answers_max
                if full and perf_s() >= self._retry_s:
                    await self._make_room()
                if self._file.size <= self._bytes_max:
                    await self._offload.run(partial(self._file.append, new))
                    self._refused = False
            except OSError as error:
                self._refuses(error)

    async def _make_room(self) -> None:
        """Without the traces that were given no answer for longest."""
        self._retry_s = perf_s() + RETRY_S
        sizes = {key: sum(row.size for row in trace.rows) for key, trace in self._traces.items()}
        nbytes = sum(sizes.values())
        for key, size in sizes.items():
            if nbytes <= ROOM * self._bytes_max and self._count <= ROOM * self._answers_max:
                break
            for row in self._forget(key):
                row.gone = True
            nbytes -= size
        rows = [row for trace in self._traces.values() for row in trace.rows]
        await self._offload.turns(self._file.rewrite(rows))
        self._retry_s = 0.0

    def _refuses(self, why: object) -> None:
        if not self._refused:
            self._refused = True
            log.warning(_NOT_KEPT, why=why)


@asynccontextmanager
async def opened_answers(path: Path, config: DispatchConfig) -> AsyncGenerator[Answers, None]:
    """What is kept in a file, which is made if it is not there; what cannot be read is put aside. Without a limit
    (``answers_bytes_max`` 0), and where there can be no file, nothing is kept."""
    offload = ThreadOffload("answers")
    try:
        file = await _open(path, config, offload)
        if file is None:
            yield NoAnswers()
            return
        try:
            yield file
        finally:
            await file.aclose()
    finally:
        offload.close()


async def _open(path: Path, config: DispatchConfig, offload: Offload) -> AnswerFile | None:
    try:
        if not config.answers_bytes_max:
            await offload.run(partial(path.unlink, missing_ok=True))
            return None
        file, found = await offload.run(partial(_opened, path))
    except OSError as error:
        log.warning(_NOT_KEPT, why=error)
        return None
    return AnswerFile(file, found, offload, config.answers_bytes_max, config.answers_max)


def _opened(path: Path) -> tuple[AnswerBytes, list[tuple[Whose, Row]]]:
    file = AnswerBytes(path)
    try:
        return file, file.load()
    except Damaged as damaged:
        aside = path.with_name(path.name + ".damaged")
        log.warning("the answers that were kept cannot be read: the file was put aside", file=aside, why=damaged)
        file.close()
        path.replace(aside)
    file = AnswerBytes(path)
    return file, file.load()
