"""Steps that wait at workers are placed anew where others have become idle: prompts at prefill workers, and whole steps
at decode workers whose memory is full of steps that do not give way.

What was the cheapest place when a step came need not be it any more: what came after it has delayed it, or another
worker is done. The last of the longest queue is looked at first: it waits longest.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from router.dispatch.predicted import Predicted
from router.dispatch.run import Run
from router.fleet.load import Key, WorkerTable
from router.policy.placement import Placement, relieves
from tracehaul.runtime import clock

LOOK_S = 0.5
LOOKS_MAX = 8
"""Steps looked at each time."""


class _Waiting(NamedTuple):
    since_s: float
    due_s: float
    """When its turn comes, about: in that order workers compute prompts."""
    work_s: float
    """Of the worker."""


class Relief:
    """One pool's. ``price`` says where a step would be placed now if not by that worker. While it waits, ``predicted``
    says who is about to have its blocks.
    """

    def __init__(
        self, tables: Sequence[WorkerTable], predicted: Predicted, price: Callable[[Run, Key], Placement | None]
    ) -> None:
        self._tables = tables
        self._predicted = predicted
        self._price = price
        self._queues: dict[Key, dict[Run, _Waiting]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def close(self) -> None:
        """Look at nothing more."""
        self._closed = True
        self._queues.clear()
        if self._timer is not None:
            self._timer.cancel()

    def enter(self, run: Run, placement: Placement) -> None:
        """A step was sent to where it may have to wait."""
        if placement.waits_at is not None and not self._closed:
            now_s, (at, work_s) = clock.now_s(), placement.waits_at
            due_s = now_s + max(table.due_s(at, work_s) for table in self._tables)
            self._queues.setdefault(at, {})[run] = _Waiting(now_s, due_s, work_s)
            self._plan()

    def leave(self, run: Run, placement: Placement) -> None:
        """Its prompt is computed, or it ended. Leaving twice is harmless."""
        at, _ = placement.waits_at or (None, 0.0)
        if at is not None and at in self._queues:
            self._queues[at].pop(run, None)
            if not self._queues[at]:
                del self._queues[at]

    def _plan(self) -> None:
        if self._timer is None and self._queues:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def _look(self) -> None:
        self._timer = None
        now_s = clock.now_s()
        for queue in self._queues.values():
            for run in queue:
                self._predicted.renew(run.request.step, run.hashes, now_s)
        waits_s = {
            key: float(wait_s)
            for table in self._tables
            for key, wait_s in zip(table.keys, table.queue_s(now_s), strict=True)
            if key in self._queues
        }
        looks = LOOKS_MAX
        for key, wait_s in sorted(waits_s.items(), key=lambda item: (-item[1], item[0])):
            queue = sorted(self._queues[key].items(), key=lambda item: item[1].due_s)
            while looks and len(queue) > 1:  # nothing is gained for the first: it is computed now
                looks -= 1
                run, waiting = queue.pop()
                # Who computes what others wait for stays.
                alone = not any(_continues(sibling, run) for sibling, _ in queue)
                other = self._price(run, key) if alone else None
                if other is not None and relieves(other, wait_s, now_s - waiting.since_s):
                    run.move(key, wait_s, other.cost_s)
                    break
                wait_s -= waiting.work_s
        self._plan()


def _continues(other: Run, run: Run) -> bool:
    """Whether most of what ``run`` computes is of use to the other: block hashes include all that comes before."""
    most = len(run.hashes) // 2
    return 0 < most < len(other.hashes) and other.hashes[most] == run.hashes[most]
