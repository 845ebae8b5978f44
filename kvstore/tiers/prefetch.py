"""Jobs that bring blocks to memory before anybody asks for them."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from kvstore.tiers.tiering import Tiering
from tracehaul.runtime.tasks import Tasks
from tracehaul.wire.blocks import PrefetchState
from tracehaul.wire.errors import Overloaded
from tracehaul.wire.ids import BlockHash

RUNNING_MAX = 16
REMEMBERED_MAX = 1024
"""Jobs that can be asked after; the oldest that ended are forgotten first."""
PART_BLOCKS = 64
"""Looked at together; between two parts a job can be cancelled."""
PART_TIMEOUT_S = 10.0


class _PrefetchJob:
    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.done = 0
        self.missed = 0
        self.state: Literal["running", "done", "cancelled"] = "running"


class PrefetchJobs:
    """Numbered jobs of one node. A job's blocks may be evicted again before they are read: it is a hint."""

    def __init__(self, tiering: Tiering) -> None:
        self._tiering = tiering
        self._jobs: OrderedDict[int, _PrefetchJob] = OrderedDict()
        self._last = 0
        self._running = 0
        self._tasks = Tasks("prefetch")

    def start(self, hashes: Sequence[BlockHash]) -> PrefetchState:
        """Begin a job.

        Raises:
            Overloaded: too many run.
        """
        if self._running >= RUNNING_MAX:
            raise Overloaded(f"{RUNNING_MAX} prefetch jobs are running")
        self._last += 1
        job = self._jobs[self._last] = _PrefetchJob(len(hashes))
        self._running += 1
        self._tasks.start(self._run(job, hashes), f"job {self._last}")
        while len(self._jobs) > REMEMBERED_MAX:  # fewer run than are remembered, so one of them has ended
            ended = next(number for number, old in self._jobs.items() if old.state != "running")
            del self._jobs[ended]
        return self.poll(self._last)

    def poll(self, number: int) -> PrefetchState:
        """How far a job is."""
        job = self._jobs.get(number)
        if job is None:
            return PrefetchState(number, "unknown")
        return PrefetchState(number, job.state, job.blocks, job.done, job.missed)

    def cancel(self, number: int) -> PrefetchState:
        """Let a job start no more; what is under way arrives."""
        job = self._jobs.get(number)
        if job is not None and job.state == "running":
            job.state = "cancelled"
        return self.poll(number)

    async def close(self) -> None:
        """End all jobs."""
        await self._tasks.close()

    async def _run(self, job: _PrefetchJob, hashes: Sequence[BlockHash]) -> None:
        try:
            for start in range(0, len(hashes), PART_BLOCKS):
                await asyncio.sleep(0)
                if job.state == "cancelled":
                    return
                part = hashes[start : start + PART_BLOCKS]
                async with self._tiering.promotions.promoted(part, PART_TIMEOUT_S):
                    job.missed += self._tiering.above(part).count(0)
                job.done += len(part)
            job.state = "done"
        finally:
            self._running -= 1
            if job.state == "running":
                job.state = "cancelled"
